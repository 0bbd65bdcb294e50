"""The evaluation job on converted Inception and LPIPS at their real shapes, from file to table."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import evaluate as config_file
from dinosae_jax import rules
from dinosae_jax.data import adm_npz
from dinosae_jax.eval.protocols import provenance
from dinosae_jax.jobs import evaluate
from dinosae_jax.runtime import precision, sharding
from tests import tiny
from tests.models.metrics_weights import group, relative_error, seeded_state
from tests.weights_conversion.layouts import save
from weights_conversion import convert

pytestmark = pytest.mark.slow  # Inception on 40 images, and compiled for three sets of taps

VGG = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
INCEPTION = {
    "conv.weight": 2.0, "bn.weight": "scale", "bn.bias": "shift", "fc.weight": 1.0,
    "fc.bias": "bias", "bn.running_mean": "shift", "bn.running_var": "variance",
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory):
    """Folders `inception` and `lpips` as weights_conversion.convert writes them."""
    folder = tmp_path_factory.mktemp("converted")
    recorded = np.load(data_dir / "metrics_models" / "inception_fullshape.npz")
    kind_of = lambda name: INCEPTION[".".join(name.split(".")[-2:])]  # noqa: E731
    state = seeded_state(recorded["keys"], recorded["shapes"], kind_of, recorded["crc"])
    file = save(folder / "inception.safetensors", state)
    convert.convert_file("inception_fid", [file], folder / "inception")
    recorded = np.load(data_dir / "metrics_models" / "lpips.npz")
    sides = zip([3, *VGG], VGG, strict=False)
    shapes = [shape for a, b in sides for shape in ((b, a, 3, 3), (b,))]
    kind_of = lambda name: 2.0 if name.endswith("weight") else "bias"  # noqa: E731
    state = seeded_state(recorded["vgg_keys"], shapes, kind_of, recorded["vgg_crc"])
    file = save(folder / "lpips.safetensors", {**state, **group(recorded, "lin/")})
    convert.convert_file("lpips_vgg16", [file], folder / "lpips")
    return folder


@pytest.fixture
def config(make_measurement, converted):
    def make(**changes):
        config = make_measurement(config_file, **{"kernel_subset_size": 4, **changes})
        config.weights.inception = str(converted / "inception")
        config.weights.lpips = str(converted / "lpips")
        rules.validate(config)
        return config

    return make


def read(folder):
    saved = json.loads((folder / "results.json").read_text())
    return saved, {row["metric"]: row for row in saved["results"]}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_of_converted_weights_equal_torch_fidelitys(config, data_dir):
    wanted = config()
    network = evaluate.open_network(wanted, evaluate.open_subject(wanted), sharding.make_mesh())
    recorded = np.load(data_dir / "metrics_models" / "inception_fullshape.npz")
    taps = {"pool3": "tf_2048", "spatial": "tf_spatial_nhwc7", "logits": "tf_logits_unbiased"}
    found = network(jnp.asarray(recorded["a/img_u8"]), tuple(taps))
    for tap, name in taps.items():
        assert relative_error(found[tap], recorded[f"a/{name}"]) < 1e-4, tap


def test_an_autoencoder_gets_rfid_psnr_ssim_and_lpips(config, converted, tmp_path, capsys):
    stage = tiny.write(tmp_path)
    wanted = config(init_from=str(stage), random_frozen_ok=(), images=6)
    evaluate.run(wanted, tmp_path / "out")
    shown = capsys.readouterr().out
    about, rows = read(tmp_path / "out")
    assert list(rows) == ["PSNR", "SSIM", "LPIPS", "rFID", "rKID"]
    assert (about["kind"], about["checkpoint_step"]) == ("autoencoder", 0)
    assert about["config_sha256"] == provenance.config_sha256(precision.resolve_config(wanted))
    assert about["commit"] == provenance.commit()
    assert about["features"] == "inception_fid, tf1_bilinear"
    assert all(row["count"] == 6 and np.isfinite(row["value"]) for row in rows.values())
    recipe = rows["rFID"]["recipe"]
    assert recipe["network_sha256"] == sha256(converted / "inception.safetensors")
    assert (recipe["tap"], recipe["uint8_conversion"]) == ("pool3", "truncate")
    assert rows["rFID"]["value"] > 0 and rows["LPIPS"]["value"] > 0
    assert len(rows["rFID"]["reference_hash"]) > 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in shown + "\n"
    head, _, row = table.strip().splitlines()
    assert (
        head == "| model | step | images | sampler | PSNR | SSIM | LPIPS | rFID | rKID | recipe |"
    )
    assert row.count("|") == head.count("|") and "| 0 | 6 | - |" in row


def test_samples_get_every_number_of_the_papers(config, tmp_path):
    """The reference is an .npz of ten images; samples are these in another order, and one more."""
    images = tiny.images(11, 32, 32, seed=5)
    for name, pixels in (("reference", images[:10]), ("samples", images[::-1])):
        adm_npz.write_images(tmp_path / f"{name}.npz", [pixels], len(pixels))
    wanted = config(random_frozen_ok=(), samples=str(tmp_path / "samples.npz"))
    wanted.reference = str(tmp_path / "reference.npz")
    evaluate.run(wanted, tmp_path / "out")
    about, rows = read(tmp_path / "out")
    names = ["gFID", "sFID", "IS", "IS torch-fidelity", "precision", "recall", "gKID"]
    assert list(rows) == names
    assert (about["kind"], about["model"], about["sampler"]) == ("samples", "samples.npz", "")
    for name in ("gFID", "sFID", "precision", "recall", "gKID"):
        assert rows[name]["reference_hash"] == sha256(tmp_path / "reference.npz")
        assert (rows[name]["count"], rows[name]["reference_count"]) == (11, 10)
    assert rows["recall"]["value"] == 1.0 and rows["precision"]["value"] >= 10 / 11
    assert 0 < rows["gFID"]["value"] < 1e4 and rows["gFID"]["recipe"]["form"] == "nuclear norm"
    assert rows["gFID"]["recipe"]["resize"] == "tf1_bilinear"
    assert rows["sFID"]["recipe"]["tap"] == "spatial" and rows["IS"]["value"] >= 1.0
    wanted.samples = wanted.reference
    wanted.metrics = ("frechet", "spatial_frechet", "inception_score")
    evaluate.run(wanted, tmp_path / "same")
    _, rows = read(tmp_path / "same")
    assert rows["gFID"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert rows["sFID"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_weights_of_another_kind_or_not_converted_are_one_clear_line(config, converted, tmp_path):
    wanted = config()
    for folder, message in (
        (
            converted / "lpips",
            r"the roles inception are wanted; got .*, which holds the roles lpips;",
        ),
        (tmp_path, r"holds no converted weights; .*weights_conversion\.convert --kind"),
    ):
        wanted.weights.inception = str(folder)
        with pytest.raises(ValueError, match=message) as caught:
            evaluate.run(wanted, tmp_path / "out")
        assert "\n" not in str(caught.value)
