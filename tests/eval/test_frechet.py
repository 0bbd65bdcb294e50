"""Frechet distance against recorded values of pytorch-fid, ADM, torch-fidelity and RAE."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from dinosae_jax.eval import frechet
from dinosae_jax.eval.recipe import Recipe, check_comparable

RECIPE = Recipe(network="inception_fid", tap="pool3", resize="tf1_bilinear", resolution=256)
IMPLEMENTATIONS = (
    "pytorch_fid",
    "adm",
    "torch_fidelity_f64stats",
    "torch_fidelity_f32mu",
    "rae_moments",
    "eigh_symmetric",
    "exact_nuclear",
)
pytestmark = pytest.mark.filterwarnings("ignore:Frechet distance of")


def distances(x, y):
    """Both forms: from moments and from the features."""
    moments = [frechet.statistics(side, RECIPE) for side in (x, y)]
    return frechet.frechet_distance(*moments), frechet.frechet_distance_of_few(x, y)


def check_case(recorded, case):
    for value in distances(recorded[f"{case}/x"], recorded[f"{case}/y"]):
        for name in IMPLEMENTATIONS:
            np.testing.assert_allclose(value, recorded[f"{case}/fid_{name}"], rtol=1e-6)
    exact = distances(recorded[f"{case}/x"], recorded[f"{case}/y"])[1]
    np.testing.assert_allclose(exact, recorded[f"{case}/fid_exact_nuclear"], rtol=1e-12)
    for value in distances(recorded[f"{case}/x"], recorded[f"{case}/x"]):
        for name in ("pytorch_fid", "torch_fidelity"):
            np.testing.assert_allclose(value, recorded[f"{case}/fid_self_{name}"], atol=1e-6)


@pytest.mark.parametrize("case", ["full", "rankdef"])
def test_recorded_cases(data_dir, case):
    check_case(np.load(data_dir / "metrics" / "fid_cases.npz"), case)


def test_complete_recording(golden_dir):
    recorded = np.load(golden_dir / "metrics" / "fid.npz")
    for case in ("full", "rankdef", "mixed"):
        check_case(recorded, case)
        for side, number in (("x", 1), ("y", 2)):
            found = frechet.statistics(recorded[f"{case}/{side}"], RECIPE)
            np.testing.assert_allclose(found.mean, recorded[f"{case}/mu{number}"], rtol=1e-12)
            expected = recorded[f"{case}/sigma{number}"]
            np.testing.assert_allclose(found.covariance, expected, atol=1e-12)


def test_2048_dimensions(golden_dir):
    recorded = np.load(golden_dir / "metrics" / "fid.npz")
    x, y = (recorded[f"d2048/{side}_f16"].astype(np.float32) for side in "xy")
    value = frechet.frechet_distance_of_few(x, y)
    np.testing.assert_allclose(value, recorded["d2048/fid_exact_nuclear"], rtol=1e-12)
    for name in ("torch_fidelity_f64stats", "pytorch_fid"):
        np.testing.assert_allclose(value, recorded[f"d2048/fid_{name}"], rtol=1e-6)


@pytest.mark.slow
def test_2048_dimensions_from_moments(golden_dir):
    recorded = np.load(golden_dir / "metrics" / "fid.npz")
    pair = (recorded[f"d2048/{side}_f16"].astype(np.float32) for side in "xy")
    value = frechet.frechet_distance(*(frechet.statistics(side, RECIPE) for side in pair))
    for name in ("exact_nuclear", "torch_fidelity_f64stats", "pytorch_fid"):
        np.testing.assert_allclose(value, recorded[f"d2048/fid_{name}"], rtol=1e-6)


def test_merged_statistics_depend_neither_on_batches_nor_on_their_order():
    features = np.random.default_rng(0).normal(3.0, 0.1, (331, 24)).astype(np.float32)
    whole = frechet.statistics(features, RECIPE)
    for size, order in itertools.product((1, 7, 331), (1, -1)):
        parts = [features[start : start + size] for start in range(0, len(features), size)]
        merged = functools.reduce(
            frechet.merge, (frechet.statistics(part, RECIPE) for part in parts[::order])
        )
        assert merged.count == merged.recipe.count == 331
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.scatter, whole.scatter, atol=1e-12 * whole.scatter.max())


def test_gaussians_of_known_distance():
    covariances = [np.diag([1.0, 4.0]), np.diag([9.0, 0.25])]
    means = [np.zeros(2), np.asarray([3.0, 4.0])]
    pair = [
        frechet.Statistics(100, mean, covariance * 99, RECIPE)
        for mean, covariance in zip(means, covariances, strict=True)
    ]
    expected = 25.0 + (1.0 - 3.0) ** 2 + (2.0 - 0.5) ** 2
    np.testing.assert_allclose(frechet.frechet_distance(*pair), expected, rtol=1e-12)


def test_statistics_come_back_from_file(tmp_path):
    moments = frechet.statistics(np.random.default_rng(0).normal(size=(20, 4)), RECIPE)
    frechet.write_statistics(tmp_path / "moments.npz", moments)
    read = frechet.read_statistics(tmp_path / "moments.npz")
    assert read.recipe == moments.recipe == dataclasses.replace(RECIPE, count=20)
    np.testing.assert_array_equal(read.scatter, moments.scatter)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"resize": "half_pixel_bilinear"}, True),
        ({"resolution": 512}, True),
        ({"network": "dinov3_vitl16"}, True),
        ({"tap": "spatial"}, True),
        ({"network_sha256": "f00d"}, False),  # unknown on the other side
        ({"count": 10_000, "labels": "balanced"}, False),
    ],
)
def test_mixed_recipes_are_refused(change, refused):
    other = dataclasses.replace(RECIPE, **change)
    if refused:
        with pytest.raises(ValueError, match=f"one recipe made both.*{next(iter(change))}"):
            check_comparable(RECIPE, other)
    else:
        check_comparable(RECIPE, other)


def test_bad_input_is_one_clear_line(tmp_path):
    good = np.zeros((3, 2))
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        frechet.frechet_distance_of_few(good[:1], good)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        frechet.frechet_distance(*[frechet.statistics(good[:1], RECIPE)] * 2)
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 3 rows \(first: 2\)"):
        frechet.statistics(np.asarray([[0.0], [1.0], [np.nan]]), RECIPE)
    with pytest.raises(ValueError, match=r"features \[n, d\]; got float64 \[2\]"):
        frechet.statistics(np.zeros(2), RECIPE)
    with pytest.raises(ValueError, match="one dimension"):
        frechet.frechet_distance(
            frechet.statistics(good, RECIPE), frechet.statistics(np.zeros((3, 4)), RECIPE)
        )
    with pytest.raises(ValueError, match="one dimension; got 2 and 4"):
        frechet.frechet_distance_of_few(good, np.zeros((3, 4)))
    np.savez(tmp_path / "other.npz", mu=good)
    with pytest.raises(ValueError, match="a file of moments holds mean, scatter, count and recipe"):
        frechet.read_statistics(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scatter": np.eye(3)[:2]}, r"got \[3\] and \[2, 3\]"),
        ({"scatter": np.eye(3) * np.nan}, "finite moments"),
        ({"mean": np.asarray([0.0, np.inf, 0.0])}, "finite moments"),
        ({"recipe": "pool3"}, "a recipe is JSON of the fields of `Recipe`; got 'pool3'"),
        ({"recipe": '{"made": "by hand"}'}, "a recipe is JSON of the fields"),
    ],
)
def test_damaged_statistics_are_one_clear_line(tmp_path, changes, message):
    members = {"mean": np.zeros(3), "scatter": np.eye(3), "count": 9, "recipe": RECIPE.to_json()}
    np.savez(tmp_path / "moments.npz", **{**members, **changes})
    with pytest.raises(ValueError, match=message) as error:
        frechet.read_statistics(tmp_path / "moments.npz")
    assert "\n" not in str(error.value)


def test_few_samples_are_warned_about():
    moments = frechet.statistics(np.random.default_rng(0).normal(size=(5, 8)), RECIPE)
    with pytest.warns(UserWarning, match="5 samples in 8 dimensions"):
        frechet.frechet_distance(moments, moments)
