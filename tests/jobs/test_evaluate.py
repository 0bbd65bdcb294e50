"""The evaluation job: its numbers, what it writes beside them, and what it refuses."""

import dataclasses
import json
import re
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import evaluate as config_file
from configs import rfm_dit
from dinosae_jax import rules
from dinosae_jax.data import adm_npz, images
from dinosae_jax.eval import adm_moments, features, frechet, image_quality
from dinosae_jax.eval.protocols import inputs, provenance
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.jobs import evaluate
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import flow_task
from dinosae_jax.weights import checkpoint
from tests import tiny


@pytest.fixture
def workdir(stage_workdir):
    return str(stage_workdir)


@pytest.fixture
def config(make_measurement):
    def make(**changes):
        return make_measurement(config_file, **{"kernel_subset_size": 5, **changes})

    return make


def read(folder):
    saved = json.loads((folder / "results.json").read_text())
    return saved, {row["metric"]: row for row in saved["results"]}


def pixels_of(config, split):
    source = images.open_images(config.data, split)
    crop = images.recipe_of(config.data)
    return np.stack([crop.evaluate(source[i]["image"]) for i in range(len(source))])


def write_npz(path, pixels):
    adm_npz.write_images(path, [pixels], len(pixels))
    return str(path)


def test_an_autoencoder(config, tmp_path, capsys):
    metrics = ("psnr", "ssim", "frechet", "kernel", "interpolated_frechet")
    wanted = config(metrics=metrics)
    rules.validate(wanted)
    evaluate.run(wanted, tmp_path / "a")
    shown = capsys.readouterr().out
    assert "--kind=inception_fid" in shown and "| rFD encoder |" in shown
    about, rows = read(tmp_path / "a")
    assert list(rows) == ["PSNR", "SSIM", "rFD encoder", "rKID encoder", "iFD encoder"]
    assert (about["checkpoint_step"], about["kind"]) == (None, "autoencoder")
    assert len(about["config_sha256"]) == 64 and about["dtype"] == "float32"
    assert "randomly initialised" in about["notes"][0]
    pixels = pixels_of(wanted, "eval")
    source = random_source(wanted.random_model.to_dict(), wanted.seed)
    made = Autoencoder(source).reconstruct(pixels / np.float32(255))
    eight_bit = image_quality.to_uint8(jnp.asarray(made), "truncate") / jnp.float32(255)
    psnr = image_quality.psnr(eight_bit, jnp.asarray(pixels / np.float32(255)))
    assert rows["PSNR"]["value"] == pytest.approx(float(psnr.mean()), abs=1e-2)
    assert rows["PSNR"]["recipe"]["uint8_conversion"] == "truncate"
    row = rows["rFD encoder"]
    assert (row["count"], row["reference_count"]) == (14, 14)
    assert (row["recipe"]["network"], row["recipe"]["form"]) == ("dinosae-encoder", "nuclear norm")
    assert row["value"] > 0 and rows["rKID encoder"]["spread"] > 0
    # Only the first images.
    evaluate.run(config(metrics=("psnr",), images=3), tmp_path / "c")
    _, few = read(tmp_path / "c")
    assert few["PSNR"]["count"] == 3
    assert few["PSNR"]["value"] == pytest.approx(float(psnr[:3].mean()), abs=1e-2)


@pytest.mark.slow
def test_another_batch_size_gives_the_same_numbers(config, tmp_path):
    found = []
    for size in (8, 16):
        wanted = config(metrics=("psnr", "ssim", "frechet"), batch_size=size)
        evaluate.run(wanted, tmp_path / str(size))
        found.append(read(tmp_path / str(size))[1])
    assert list(found[0]) == list(found[1])
    for name, row in found[0].items():
        assert found[1][name]["value"] == pytest.approx(row["value"], rel=1e-4), name


def test_reconstructions_that_are_not_finite_are_no_black_images(config, tmp_path, monkeypatch):
    def broken(*args):
        autoencoder = Autoencoder(*args, batch_size=8)
        nothing = jax.tree.map(lambda leaf: leaf * np.nan, autoencoder.variables["decoder"])
        autoencoder.variables["decoder"] = nothing
        return autoencoder

    opened = lambda config, source: broken(source, "float32")  # noqa: E731
    monkeypatch.setattr(evaluate.inputs, "open_autoencoder", opened)
    with pytest.raises(ValueError, match=r"NaN or infinity in 8 of a batch of 8") as caught:
        evaluate.run(config(metrics=("psnr",)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_samples_that_equal_the_reference(config, tmp_path, workdir):
    plain = config(random_frozen_ok=(), encoder=workdir)
    train_images = pixels_of(plain, "train")
    plain.samples = write_npz(tmp_path / "samples.npz", train_images[::-1])
    evaluate.run(plain, tmp_path / "a")
    about, rows = read(tmp_path / "a")
    assert list(rows) == [
        "gFD encoder",
        "precision encoder",
        "recall encoder",
        "gKID encoder",
    ]
    assert rows["gFD encoder"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert rows["precision encoder"]["value"] == rows["recall encoder"]["value"] == 1.0
    assert rows["gFD encoder"]["recipe"]["uint8_conversion"] == "stored"
    assert (about["kind"], about["model"]) == ("samples", "samples.npz")
    # The moments that it left serve as a reference, an .npz of the same images does, too.
    left = tmp_path / "a" / f"reference_{features.ENCODER_TAP}.npz"
    for name, reference in (("b", str(left)), ("c", plain.samples)):
        plain.reference, plain.metrics = reference, ("frechet",)
        evaluate.run(plain, tmp_path / name)
        _, again = read(tmp_path / name)
        assert again["gFD encoder"]["value"] == pytest.approx(0.0, abs=1e-4)
        assert len(again["gFD encoder"]["reference_hash"]) == 64
    plain.reference, plain.metrics = str(left), ()
    with pytest.raises(ValueError, match="precision_recall needs the reference's images"):
        evaluate.run(plain, tmp_path / "d")


@pytest.mark.slow
def test_interpolations_need_no_more_than_moments(config, tmp_path, workdir):
    """They are compared with the images themselves."""
    plain = config(random_frozen_ok=(), encoder=workdir, metrics=("frechet",))
    plain.samples = write_npz(tmp_path / "samples.npz", pixels_of(plain, "train"))
    evaluate.run(plain, tmp_path / "a")
    left = tmp_path / "a" / f"reference_{features.ENCODER_TAP}.npz"
    both = config(init_from=workdir, random_frozen_ok=(), reference=str(left))
    both.metrics = ("frechet", "interpolated_frechet")
    evaluate.run(both, tmp_path / "both")
    _, again = read(tmp_path / "both")
    assert list(again) == ["FD encoder", "iFD encoder"]
    assert again["iFD encoder"]["reference"].endswith("eval, the same images")


def fake_inception(variables, sha256, resize, mesh):
    """Inception's names over six numbers an image."""

    def apply(variables, images):
        pixels = images.astype(jnp.float32) / 255.0
        rows = jnp.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], -1)
        return {"pool3": rows, "spatial": rows[:, :3], "logits": 9.0 * rows}

    real = features.inception({}, sha256, resize)
    return dataclasses.replace(real, variables=variables, apply=apply)


@pytest.fixture
def with_inception(config, monkeypatch):
    converted = types.SimpleNamespace(
        variables={"inception": {}}, metadata={"files": [{"sha256": "6726825d"}]}
    )
    load = types.SimpleNamespace(load=lambda folder, roles: converted)
    inception = types.SimpleNamespace(**{**vars(features), "inception": fake_inception})
    monkeypatch.setattr(inputs, "conversion", load)
    monkeypatch.setattr(inputs, "features", inception)
    return lambda **changes: config(weights__inception="somewhere", **changes)


def test_a_published_reference_brings_its_own_moments(with_inception, tmp_path):
    wanted = with_inception(random_frozen_ok=())
    real, fake = pixels_of(wanted, "train"), pixels_of(wanted, "eval")
    wanted.samples = write_npz(tmp_path / "samples.npz", fake)
    rows = np.random.default_rng(0).normal(size=(50, 6))
    pool, spatial = (
        frechet.statistics(rows[:, :width], dataclasses.replace(adm_moments.ADM_RECIPE, tap=tap))
        for width, tap in ((6, "pool3"), (3, "spatial"))
    )
    reference = tmp_path / "VIRTUAL.npz"
    tiny.write_reference(reference, real, pool, spatial)
    wanted.reference = str(reference)
    evaluate.run(wanted, tmp_path / "out")
    _, found = read(tmp_path / "out")
    assert list(found) == [
        "gFID",
        "sFID",
        "IS",
        "IS torch-fidelity",
        "precision",
        "recall",
        "gKID",
    ]
    network = fake_inception({}, "", "tf1_bilinear", None)
    made = np.asarray(network.apply({}, jnp.asarray(fake))["pool3"])
    moments = frechet.statistics(made, network.recipe("pool3"))
    expected = frechet.frechet_distance(moments, pool)
    assert found["gFID"]["value"] == pytest.approx(expected, rel=1e-5)
    counts = {name: found[name]["reference_count"] for name in ("gFID", "precision", "gKID")}
    assert counts == {"gFID": 50, "precision": 14, "gKID": 14}
    assert found["IS"]["value"] >= 1.0
    unknown = {name: value for name, value in np.load(reference).items() if name != "recipe"}
    np.savez(reference, **unknown)
    with pytest.raises(ValueError, match="does not say and is none of ADM's ImageNet files"):
        evaluate.run(wanted, tmp_path / "unknown")
    wanted.reference_moments.update({"resize": "tf1_bilinear", "count": 50})
    rules.validate(wanted)
    evaluate.run(wanted, tmp_path / "answered")
    assert read(tmp_path / "answered")[1]["gFID"]["value"] == found["gFID"]["value"]
    wanted.resize = "half_pixel_bilinear"
    with pytest.raises(ValueError, match="resize 'half_pixel_bilinear' and 'tf1_bilinear'"):
        evaluate.run(wanted, tmp_path / "other")


def test_samples_sorted_by_class_get_a_note_beside_their_inception_score(with_inception, tmp_path):
    pixels = np.zeros((5002, 8, 8, 3), np.uint8)
    for number, some in enumerate(np.array_split(pixels, 6)):  # the six numbers of the network
        some[:, : 8 if number < 3 else 2, :, number % 3] = 200
    wanted = with_inception(random_frozen_ok=(), metrics=("inception_score",), batch_size=1024)
    for name, order in (("sorted", np.arange(5002)), ("mixed", np.arange(5002) * 845 % 5002)):
        wanted.samples = write_npz(tmp_path / f"{name}.npz", pixels[order])
        evaluate.run(wanted, tmp_path / name)
        about, rows = read(tmp_path / name)
        assert rows["IS"]["count"] == 5002
        noted = any("meaningless for samples sorted by class" in note for note in about["notes"])
        assert noted == (name == "sorted")


def test_features_that_are_not_finite_are_one_clear_line(with_inception, tmp_path, monkeypatch):
    def broken(*args):
        network = fake_inception(*args)
        apply = lambda v, x: {k: each / 0.0 for k, each in network.apply(v, x).items()}  # noqa: E731
        return dataclasses.replace(network, apply=apply)

    monkeypatch.setattr(inputs.features, "inception", broken)
    wanted = with_inception(random_frozen_ok=())
    wanted.samples = write_npz(tmp_path / "samples.npz", pixels_of(wanted, "eval"))
    with pytest.raises(ValueError, match="NaN or infinity in 14 of 14 rows") as caught:
        evaluate.run(wanted, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_a_flow_is_sampled_first(config, tmp_path):
    flow = write_flow(tmp_path)
    wanted = config(
        init_from=str(flow), metrics=("frechet", "precision_recall"), random_frozen_ok=()
    )
    wanted.sample.update_from_flattened_dict(
        {"count": 10, "batch_per_device": 2, "sampling.steps": 2}
    )
    evaluate.run(wanted, tmp_path / "out")
    about, rows = read(tmp_path / "out")
    assert (about["kind"], about["checkpoint_step"], about["steps"]) == ("flow", 0, 2)
    assert about["sampler"] == "euler_projection"
    assert rows["gFD encoder"]["count"] == 10
    assert rows["gFD encoder"]["recipe"]["labels"] == "balanced"
    assert (tmp_path / "out" / "samples" / "samples.npz").exists()
    wanted.metrics = ("kernel",)
    wanted.kernel_subset_size = 12
    with pytest.raises(ValueError, match="needs at least 12 images; got 10"):
        evaluate.run(wanted, tmp_path / "few")
    wanted.metrics = ("psnr",)
    with pytest.raises(ValueError, match="psnr compares images with their reconstructions"):
        evaluate.run(wanted, tmp_path / "psnr")


def write_flow(folder):
    """The workdir of a flow at step 0, with a random autoencoder."""
    wanted = rfm_dit.get_config("tiny")
    smallest = {k: v for k, v in tiny.TINIEST.items() if k != "steps"}
    place = folder / "data"
    tiny.prepare(folder)
    wanted.update_from_flattened_dict(
        {
            **smallest,
            "model.dit.input_size": 2,
            "model.dit.in_channels": 32,
            "model.dit.num_classes": 1,
            "model.dit.hidden_size": 32,
            "model.dit.depth": 1,
            "model.dit.num_heads": 2,
            "data.source": f"folder:{place}",
        }
    )
    wanted = precision.resolve_config(wanted)
    workdir = folder / "flow"
    workdir.mkdir()
    task = flow_task.prepare(wanted, workdir, sharding.make_mesh())
    with checkpoint.open_manager(workdir, keep=1) as manager:
        checkpoint.save(manager, task.restore(manager), task.record)
        checkpoint.wait(manager)
    return workdir


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("fid",)}, "metrics must be known metrics; got 'fid'"),
        (
            {"metrics": ("spatial_frechet",)},
            r"needs FID's Inception; got dinosae-encoder; .*convert",
        ),
        ({"metrics": ("lpips",)}, r"lpips needs weights; got none .*--kind=lpips_vgg16"),
        ({"kernel_subset_size": 100}, "needs at least 100 images; got 14"),
        (
            {"reference": "nowhere.npz"},
            "reference must be an .npz file; got nowhere.npz, which does",
        ),
        ({"samples": "x.npz", "init_from": "y"}, "got both init_from and samples"),
        ({"samples": "nowhere.npz"}, "samples must be an .npz file"),
        ({"init_from": "nowhere"}, "does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate.run(config(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_archives_of_another_layout_or_size_are_refused(config, tmp_path, workdir):
    wanted = config(encoder=workdir)
    np.savez(tmp_path / "named.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    wanted.samples = str(tmp_path / "named.npz")
    with pytest.raises(ValueError, match="with members images; name the images arr_0"):
        evaluate.run(wanted, tmp_path / "out")
    wanted.samples = write_npz(tmp_path / "large.npz", np.zeros((20, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="got resolution 64 and 32"):
        evaluate.run(wanted, tmp_path / "out")
    wanted.samples = write_npz(tmp_path / "wide.npz", np.zeros((20, 32, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="samples are square; got 32 x 64"):
        evaluate.run(wanted, tmp_path / "out")
    wanted.reference = wanted.samples
    wanted.samples = write_npz(tmp_path / "good.npz", np.zeros((20, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="a reference's images are square; got 32 x 64"):
        evaluate.run(wanted, tmp_path / "out")
    wanted.encoder = ""
    with pytest.raises(ValueError, match=r"features need a network.*--kind=inception_fid"):
        evaluate.run(wanted, tmp_path / "out")


def test_an_empty_init_from_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"evaluate needs trained weights.*:tiny"):
        config = config_file.get_config()
        config.init_from = ""
        rules.validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"uint8_conversion": "floor"},
            r"uint8_conversion must be .*; got 'floor'.*round_signed",
        ),
        (
            {"resize": "bilinear"},
            r"resize must be .*; did you mean 'tf1_bilinear'",
        ),
        ({"kernel_subset_size": 1}, "kernel_subset_size must be at least 2; got 1"),
        ({"images": -1}, "images must be at least 0; got -1"),
        ({"reference_images": -1}, "reference_images must be at least 0; got -1"),
        ({"reference_moments__count": 50}, "reference_moments.resize must be a known name; got ''"),
        ({"reference_moments__resize": "tf1_bilinear"}, r"reference_moments\.count must be at lea"),
    ],
)
def test_fields_out_of_range_are_refused_before_anything_is_loaded(config, changes, message):
    with pytest.raises(ValueError, match=message):
        rules.validate(config(**changes))


def test_the_commit_is_that_of_this_code_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    run = lambda *arguments: subprocess.run([*git, *arguments], check=True)  # noqa: E731
    code, other = tmp_path / "measure.py", tmp_path / "other.py"
    monkeypatch.setattr(provenance, "__file__", str(code))
    code.write_text("")
    other.write_text("")
    assert provenance.commit() == ""
    run("init", "-q")
    run("add", "other.py")
    run("commit", "-q", "-m", "other")
    assert provenance.commit() == ""  # an installation inside another project
    run("add", "measure.py")
    run("commit", "-q", "-m", "this")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit())
    code.write_text("# changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", provenance.commit())
