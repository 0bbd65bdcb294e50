"""Feature extraction: independent of batches, devices and host order; distances and results."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.data import adm_npz
from dinosae_jax.eval import adm_moments, distances, features, frechet, interpolation, results
from dinosae_jax.models import autoencoder
from dinosae_jax.models.efficientnet import EfficientNetLite0
from dinosae_jax.models.inception import InceptionFID
from dinosae_jax.runtime import sharding
from tests import tiny

METRICS = {"frechet": ("FD", "mean"), "kernel": ("KD", "mean"), "precision_recall": ("", "mean")}


def colour_features(variables, images):
    pixels = images.astype(jnp.float32) / 255.0
    moments = [pixels.mean((1, 2)), pixels.std((1, 2))]
    return {"mean": jnp.concatenate(moments, -1) @ variables}


@pytest.fixture(scope="module")
def network():
    weights = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    return features.FeatureNetwork("colours", "abc", "none", METRICS, weights, colour_features)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3)).astype(np.uint8)
    adm_npz.write_images(path, [images], len(images))
    return adm_npz.open_archive(path)


def collector_for(network, keep=None):
    recipes = {"mean": network.recipe("mean", resolution=8)}
    return features.Collector(recipes, None if keep is None else np.asarray(keep))


def run(network, archive, devices, batch_size, keep=None):
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    rows = sharding.local_rows(mesh, batch_size)
    placed = features.place(features.archive_batches(archive, batch_size, rows), mesh)
    return features.extract(network, placed, collector_for(network, keep))


def test_neither_batches_nor_devices_change_features(network, archive, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)
    ours = run(network, archive, 1, 5)
    (images,) = archive.batches(21)
    expected = np.asarray(colour_features(network.variables, jnp.asarray(images))["mean"])
    np.testing.assert_allclose(ours.features["mean"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.index, np.arange(21))
    assert ours.moments["mean"].recipe.count == 21
    covariance = np.cov(ours.features["mean"].astype(np.float64), rowvar=False)
    np.testing.assert_allclose(ours.moments["mean"].covariance, covariance, atol=1e-12)
    for devices, batch_size in ((8, 8), (4, 32)):
        theirs = run(network, archive, devices, batch_size)
        np.testing.assert_allclose(theirs.features["mean"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            theirs.moments["mean"].scatter, ours.moments["mean"].scatter, rtol=1e-4, atol=1e-5
        )


def test_the_order_of_hosts_does_not_matter(network, archive):
    rows = (np.array([0, 1, 6, 7]), np.arange(2, 6))
    halves = [list(features.archive_batches(archive, 8, mine)) for mine in rows]
    (whole,) = archive.batches(21)
    sets = []
    for order in ((0, 1), (1, 0)):
        collector = collector_for(network)
        for parts in zip(*(halves[host] for host in order), strict=True):
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            rows = batch["image"].reshape(8, -1)[:, :3].astype(np.float32)
            collector.add({"mean": rows}, batch["index"], batch["mask"])
        sets.append(collector.finish())
    np.testing.assert_array_equal(sets[0].features["mean"], whole.reshape(21, -1)[:, :3])
    np.testing.assert_array_equal(sets[0].features["mean"], sets[1].features["mean"])
    np.testing.assert_array_equal(sets[0].moments["mean"].scatter, sets[1].moments["mean"].scatter)


def test_chosen_rows_are_kept_and_all_are_counted(network, archive):
    found = run(network, archive, 1, 8, keep=[2, 9, 20])
    np.testing.assert_array_equal(found.index, [2, 9, 20])
    assert found.moments["mean"].count == 21
    whole = run(network, archive, 1, 8)
    np.testing.assert_array_equal(found.features["mean"], whole.features["mean"][[2, 9, 20]])


def test_features_that_are_not_finite_are_refused(network):
    collector = collector_for(network)
    rows = np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32)
    collector.add({"mean": rows}, np.arange(2), np.ones(2, bool))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 rows"):
        collector.finish()
    with pytest.raises(ValueError, match="at least 1 image; got 0"):
        collector_for(network).finish()


def test_inception_gives_every_tap_under_its_recipe():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    shapes = jax.eval_shape(InceptionFID().init, jax.random.key(0), images)
    network = features.inception({}, "6726825d", "half_pixel_bilinear")
    taps = jax.eval_shape(network.apply, shapes, images)
    assert {tap: leaf.shape[1] for tap, leaf in taps.items()} == {
        "pool3": 2048,
        "spatial": 2023,
        "logits": 1008,
    }
    recipe = network.recipe("pool3", resolution=256)
    assert (recipe.network, recipe.network_sha256) == ("inception_fid", "6726825d")
    with pytest.raises(ValueError, match="got resize 'tf1_bilinear' and 'half_pixel_bilinear'"):
        frechet.check_comparable(adm_moments.ADM_RECIPE, recipe)
    with pytest.raises(ValueError, match="resize is one of"):
        features.inception({}, "", "bilinear")


def test_efficientnet_says_its_name_and_is_never_called_fid():
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), images)
    network = features.efficientnet({}, "57934424")
    taps = jax.eval_shape(network.apply, shapes, images)
    assert network.metrics["frechet"] == ("FD EfficientNet-Lite0", "pool")
    assert network.metrics["kernel"] == ("KID EfficientNet-Lite0", "pool")
    assert taps["pool"].shape == (2, 1280)
    recipe = network.recipe("pool", resolution=64)
    assert (recipe.network, recipe.resize) == ("efficientnet_lite0", "half_pixel_bilinear")
    assert (recipe.network_sha256, recipe.resolution) == ("57934424", 64)
    assert all("FID" not in name for name, _ in network.metrics.values())
    with pytest.raises(ValueError, match="got network 'efficientnet_lite0' and 'inception_fid'"):
        frechet.check_comparable(recipe, adm_moments.ADM_RECIPE)


@pytest.mark.slow
def test_the_encoder_computes_in_float32_and_is_never_called_fid():
    model = tiny.model()
    exact, half = (autoencoder.build(model, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = jax.jit(lambda key: autoencoder.init(exact, key, 32))(jax.random.PRNGKey(0))
    images = jnp.asarray(tiny.images(2, 32, 32))
    tap = (features.ENCODER_TAP,)
    ours, theirs = (
        features.encoder(modules, variables, "x")(images, tap)[tap[0]] for modules in (exact, half)
    )
    tokens = jax.jit(lambda v, x: autoencoder.encode(exact, v, x).tokens)(variables, images / 255.0)
    np.testing.assert_allclose(ours, tokens.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours, theirs)
    network = features.encoder(exact, variables, "x")
    names = [name for name, _ in network.metrics.values()]
    assert all(name.endswith(" encoder") and "FID" not in name for name in names)


def test_the_form_of_the_distance_follows_the_counts(network, archive):
    few, many = run(network, archive, 1, 8), run(network, archive, 1, 8, keep=[0, 1, 2])
    assert distances.frechet_of_sets(many, few, "mean")[1] == "symmetric eigen"
    assert distances.frechet_of_sets(few, few, "mean")[1] == "symmetric eigen"
    small = features.Collector({"mean": network.recipe("mean")})
    small.add({"mean": few.features["mean"][:4]}, np.arange(4), np.ones(4, bool))
    value, form = distances.frechet_of_sets(small.finish(), few, "mean")
    assert form == "nuclear norm"
    expected = frechet.frechet_distance_of_few(few.features["mean"][:4], few.features["mean"])
    assert value == expected


def test_metrics_of_two_sets(network, archive):
    found = run(network, archive, 1, 8)
    reference = distances.Reference(found, "itself", "f00")
    rows = [
        row
        for metric in METRICS
        for row in distances.distance(metric, network, found, reference, "g", subset_size=10)
    ]
    values = {row.metric: row.value for row in rows}
    assert values.pop("gFD") == pytest.approx(0, abs=1e-6)
    assert abs(values.pop("gKD")) < 0.5  # unbiased: around zero, not at it
    assert values == {"precision": 1.0, "recall": 1.0}
    assert {(row.count, row.reference_count, row.reference_hash) for row in rows} == {
        (21, 21, "f00")
    }
    assert rows[2].recipe["protocol"] == "plain, k = 3"
    other = dataclasses.replace(network, sha256="def")
    moments = {"mean": dataclasses.replace(found.moments["mean"], recipe=other.recipe("mean"))}
    with pytest.raises(ValueError, match="network_sha256"):
        theirs = distances.Reference(dataclasses.replace(found, moments=moments), "", "")
        distances.distance("frechet", network, found, theirs)


@pytest.mark.parametrize(
    ("metric", "generated", "reference", "message"),
    [
        (
            "kernel",
            999,
            5000,
            "at least 1000 images; got 999; make more, or pass --config.kernel_subset_size=999",
        ),
        ("kernel", 5000, 10, "needs at least 1000 reference images; got 10"),
        ("frechet", 1, 10, "needs at least 2 images; got 1"),
        ("precision_recall", 10, 3, "needs at least 4 reference images; got 3"),
        ("precision_recall", 10, None, "needs the reference's images; got a file of moments"),
        ("inception_score", 9, None, "needs at least 10 images; got 9"),
    ],
)
def test_too_few_images_are_one_clear_line(metric, generated, reference, message):
    with pytest.raises(ValueError, match=message):
        distances.check_counts((metric,), generated, reference, 1000)


def test_moments_alone_are_enough_for_the_frechet_distance():
    distances.check_counts(("frechet", "spatial_frechet", "inception_score"), 10, None, 1000)


def test_results_are_written_with_a_table(tmp_path):
    about = {"model": "runs/flow", "checkpoint_step": 20, "sampler": "rodrigues", "steps": 50}
    rows = [
        results.Result("gFID", 3.0712, 50_000, {"tap": "pool3"}),
        results.Result("KID", 0.00123456, 50_000, {}, spread=0.0001),
        results.Result("IS", 209.71, 50_000, {}),
    ]
    text = results.write(tmp_path, about, rows)
    assert text.splitlines() == [
        "| model | step | images | sampler | gFID | KID | IS | recipe |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| runs/flow | 20 | 50000 | rodrigues 50 | 3.071 | 0.00123 ± 0.00010 | 209.7 | - |",
    ]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["results"][0]["recipe"] == {"tap": "pool3"}
    assert (tmp_path / "results.md").read_text() == text + "\n"
    with pytest.raises(ValueError, match="results must be finite; got NaN or infinity for gFID"):
        results.write(tmp_path, about, [results.Result("gFID", float("nan"), 2, {})])


@pytest.mark.parametrize("block", [(64, 64), (7, 5)])
def test_nearest_neighbours_equal_a_search(block):
    points = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) + 3.0
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    found = interpolation.nearest_neighbours(points, block)
    np.testing.assert_array_equal(found, apart.argmin(1))


def test_equal_points_are_each_others_neighbours():
    points = np.array([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(interpolation.nearest_neighbours(points)[[0, 2]], [2, 0])
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        interpolation.nearest_neighbours(points[:1])
