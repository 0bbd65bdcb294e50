"""Generator and sample job: the same pictures from any folder, on any devices, in any chunks."""

import copy
import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

import dinosae_jax
from configs import sample as sample_config
from dinosae_jax import rules
from dinosae_jax.data import adm_npz, png
from dinosae_jax.inference import batching, drawing, sampling_program
from dinosae_jax.inference.generator import Generator
from dinosae_jax.jobs import sample
from dinosae_jax.runtime import sharding, stopping
from dinosae_jax.runtime.precision import BFLOAT16_LAYERS, cast_kernels_to_bfloat16
from dinosae_jax.weights import weight_source
from tests import tiny

KEY = jax.random.PRNGKey(5)
LABELS = np.array([0, 3, 3, 9, 7])


@pytest.fixture(scope="module")
def generator(flow_workdir):
    return Generator.load(flow_workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def images(generator):
    return generator.sample(LABELS, key=KEY)


def test_images_are_float32_in_the_unit_range(images):
    assert (images.shape, images.dtype) == ((5, 64, 64, 3), np.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


def test_every_kind_of_folder_gives_the_same_images(flow_workdir, generator, images, tmp_path):
    source = weight_source.open_weights(flow_workdir)
    weight_source.export(source, tmp_path / "export", ("decoder", "dit"))
    for folder in (flow_workdir / "checkpoints" / "2", tmp_path / "export"):
        other = dinosae_jax.Generator.load(folder, mesh=generator.mesh)
        assert other.convention == generator.convention
        np.testing.assert_array_equal(other.sample(LABELS, key=KEY), images)


def test_a_sample_depends_on_its_index_and_label_alone(generator, images):
    later = generator.sample(LABELS[3:], key=KEY, first_index=3)
    np.testing.assert_allclose(later, images[3:], atol=1 / 255)
    other = generator.sample(LABELS, key=jax.random.PRNGKey(6))
    assert np.abs(other - images).max() > 10 / 255


def test_one_and_eight_devices_draw_the_same(flow_workdir, generator, images):
    eight = Generator.load(flow_workdir)
    assert eight.mesh.size == 8
    noise, same = (np.asarray(g.noise(KEY, np.arange(16))) for g in (generator, eight))
    np.testing.assert_array_equal(noise, same)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=-1), 8.0, rtol=1e-5)
    np.testing.assert_allclose(eight.sample(LABELS, key=KEY), images, atol=1 / 255)


def test_settings_change_the_images(generator, images):
    # Two steps of training make the label's effect tiny; an absurd scale makes it visible.
    guided = generator.sample(LABELS, key=KEY, guidance=1e5, interval=(0.2, 1.0))
    assert np.abs(guided - images).max() > 1 / 255
    louder = generator.sample(LABELS, key=KEY, decode_radius=16.0)
    assert np.abs(louder - images).max() > 1 / 255


def test_a_weaker_flow_guides(generator, images):
    weaker = copy.copy(generator)
    half = jax.tree.map(lambda x: x / 2, generator.variables["dit"]["params"]["final_layer"])
    params = {**generator.variables["dit"]["params"], "final_layer": half}
    weaker.variables = {**generator.variables, "dit": {"params": params}}
    guided = generator.guided_by(weaker)
    np.testing.assert_array_equal(guided.sample(LABELS, key=KEY), images)  # at scale 1, not read
    led = guided.sample(LABELS, key=KEY, guidance=1e3)
    assert np.abs(led - images).max() > 1 / 255
    same = generator.guided_by(generator).sample(LABELS, key=KEY, guidance=1e3)
    np.testing.assert_allclose(same, images, atol=1 / 255)
    assert guided.can_guide
    outside = guided.sample(LABELS, key=KEY, guidance=1e3, interval=(0.0, 0.0))
    np.testing.assert_allclose(outside, images, atol=1 / 255)


def test_a_weaker_flow_of_another_path_is_refused(generator):
    other = copy.copy(generator)
    other.networks = generator.networks._replace(path="linear")
    with pytest.raises(ValueError, match="have norms of their own; got decode_radius=9"):
        other.settings(decode_radius=9.0)
    with pytest.raises(ValueError, match="one path; got geodesic, and linear of the weaker flow"):
        generator.guided_by(other)
    other.convention = dataclasses.replace(generator.convention, radius=7.0)
    with pytest.raises(ValueError, match=r"radius 8\.0 != 7\.0"):
        generator.guided_by(other)


def test_the_job_takes_a_weaker_flow(flow_workdir, tmp_path):
    config = config_for(flow_workdir, weaker=str(flow_workdir))
    with pytest.raises(ValueError, match="a scale other than 1; got guidance=1"):
        sample.run(config, tmp_path)
    assert drawing.open_generator(config).can_guide
    config.init_from = ""
    with pytest.raises(ValueError, match="no init_from"):
        rules.validate(config)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 10], {}, "0 to 9, at least one; got \\[10\\]"),
        ([-1], {}, "got \\[-1\\]"),
        ([0.5], {}, "whole numbers"),
        ([], {}, "at least one"),
        ([0], {"steps": 0}, "at least 1 step; got steps=0"),
        ([0], {"sampler": "heun"}, "did you mean 'geodesic_heun'"),
        ([0], {"interval": (0.5, 0.2)}, "guidance interval"),
        ([0], {"decode_radius": -1.0}, "decode_radius must be above zero"),
    ],
)
def test_bad_requests_are_refused(generator, labels, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        generator.sample(labels, key=KEY, **settings)
    assert "\n" not in str(error.value)


def test_guidance_without_a_null_label_is_refused():
    with pytest.raises(ValueError, match="null label"):
        rules.validate_sampling({"guidance": 2.0}, has_null_label=False)
    rules.validate_sampling({"guidance": 1.0}, has_null_label=False)


def test_a_convention_that_does_not_fit_is_refused(flow_workdir, generator):
    source = weight_source.open_weights(flow_workdir)

    def build(**changes):
        fields = {**source.convention, **changes}
        convention = type(generator.convention).from_dict(fields)
        Generator(source.model, source.variables, convention, source.flow, generator.mesh)

    with pytest.raises(ValueError, match="tokens 16 != 64"):
        build(tokens=64)
    with pytest.raises(ValueError, match="pixels imagenet != unit"):
        build(pixels="unit")
    with pytest.raises(ValueError, match="measured decode radius"):
        build(decode_radius=None)


def test_half_precision_touches_only_layers_that_compute_in_it(generator):
    for role, tree in cast_kernels_to_bfloat16(generator.variables).items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names = {entry.key for entry in path}
            half = path[-1].key == "kernel" and names & set(BFLOAT16_LAYERS[role])
            assert leaf.dtype == (jax.numpy.bfloat16 if half else np.float32), (role, path)


def config_for(flow_workdir, **changes):
    config = sample_config.get_config("tiny")
    config.init_from = str(flow_workdir)
    config.count, config.batch_per_device, config.chunk = 20, 1, 8
    config.sampling.steps = 4
    config.update_from_flattened_dict(changes)
    return config


def test_a_stopped_job_goes_on_with_the_missing_chunks(flow_workdir, tmp_path, monkeypatch):
    sample.run(config_for(flow_workdir, chunk=20), tmp_path / "whole")
    folder = tmp_path / "parts"
    real, drawn = drawing.write_chunk, []

    def write_then_stop(target, start, images):
        real(target, start, images)
        drawn.append(start)
        if len(drawn) == 1:
            raise stopping.Interrupted("stopped by the test", 15)

    monkeypatch.setattr(drawing, "write_chunk", write_then_stop)
    with pytest.raises(stopping.Interrupted):
        sample.run(config_for(flow_workdir), folder)
    assert not (folder / "samples.npz").exists()
    sample.run(config_for(flow_workdir), folder)
    assert drawn == [0, 8, 16]
    ours, theirs = (
        np.concatenate([*adm_npz.open_archive(f / "samples.npz").batches(64)])
        for f in (folder, tmp_path / "whole")
    )
    assert ours.shape == (20, 64, 64, 3)
    np.testing.assert_allclose(ours.astype(int), theirs.astype(int), atol=1)
    assert len([*(folder / "images").glob("*.png")]) == 20
    assert not (folder / "chunks").exists()
    np.testing.assert_array_equal(np.load(folder / "labels.npy"), np.arange(20) % 10)
    sample.run(config_for(flow_workdir), folder)  # finished: nothing is drawn again
    assert len(drawn) == 3
    with pytest.raises(
        ValueError, match=r"one series of samples; got .* \(seed: 1 here, 0 there\)"
    ):
        sample.run(config_for(flow_workdir, seed=1), folder)


def test_pictures_are_the_samples_rounded(generator, images):
    drawn = generator.pictures(LABELS, key=KEY, first_index=0, batch_size=2)
    sizes, pictures = zip(*((len(batch), batch) for batch in drawn), strict=True)
    assert sizes == (2, 2, 1)
    joined = np.concatenate(pictures)
    assert joined.dtype == np.uint8
    np.testing.assert_allclose(joined.astype(int), png.as_picture(images).astype(int), atol=1)
    levels, finite = sampling_program.as_pictures(images)
    np.testing.assert_array_equal(levels, png.as_picture(images))
    assert finite.all()


def test_png_files_are_written_on_request(flow_workdir, tmp_path):
    sample.run(config_for(flow_workdir, png=False, count=10), tmp_path)
    assert not (tmp_path / "images").exists()
    assert adm_npz.open_archive(tmp_path / "samples.npz").shape == (10, 64, 64, 3)


def test_png_files_hold_the_pictures(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
    drawing.write_pngs(tmp_path / "images", 5, pictures)
    for index, picture in enumerate(pictures, 5):
        found = png.decode_png((tmp_path / "images" / f"{index:07d}.png").read_bytes())
        np.testing.assert_array_equal(found, picture)


@pytest.mark.parametrize("size", [1, 4, 5, 20])
def test_batches_are_regrouped_in_their_order(size):
    batches = np.split(np.arange(11), [3, 4, 9])
    groups = list(batching.regroup(batches, size))
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    np.testing.assert_array_equal(np.concatenate(groups), np.arange(11))


def test_samples_that_are_not_finite_are_no_black_images(flow_workdir, tmp_path, monkeypatch):
    config = config_for(flow_workdir)
    broken = drawing.open_generator(config)
    params = broken.variables["decoder"]
    broken.variables["decoder"] = jax.tree.map(lambda leaf: leaf * np.nan, params)
    monkeypatch.setattr(drawing, "open_generator", lambda _: broken)
    with pytest.raises(ValueError, match=r"must be finite; got NaN .* from number 0") as caught:
        sample.run(config, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_random_flow_is_named_as_such():
    config = sample_config.get_config("tiny")
    config.random_flow = tiny.small_flow()
    generator = drawing.open_generator(config)
    assert "randomly initialised" in generator.notes[0]
    assert generator.num_classes == 10


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        ("all", 0, [0, 1, 2]),
        ("all", 5, [0, 1, 2, 0, 1]),
        ("balanced", 6, [0, 1, 2, 0, 1, 2]),
        ("2,2,0", 0, [2, 2, 0]),
        ("1", 3, [1, 1, 1]),
    ],
)
def test_labels(labels, count, expected):
    assert drawing.choose_labels(labels, count, 3, 0).tolist() == expected


def test_random_and_balanced_labels():
    assert np.bincount(drawing.choose_labels("balanced", 0, 3, 0)).tolist() == [50, 50, 50]
    long, short = (drawing.choose_labels("random", n, 7, 4) for n in (100, 30))
    np.testing.assert_array_equal(long[:30], short)
    assert set(long) == set(range(7))


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ("random", 0, "needs a number of images"),
        ("balanced", 5, "count=5 for 3 classes"),
        ("cats", 0, "numbers joined by commas; got 'cats'"),
    ],
)
def test_labels_that_cannot_be_chosen(labels, count, message):
    with pytest.raises(ValueError, match=message):
        drawing.choose_labels(labels, count, 3, 0)


def test_sampling_without_a_flow_is_refused():
    with pytest.raises(ValueError, match="empty init_from"):
        config = sample_config.get_config()
        config.init_from = ""
        rules.validate(config)
    config = sample_config.get_config("tiny")
    rules.validate(config)
    assert isinstance(config, ml_collections.ConfigDict)
