"""Precision and recall against recorded values of torch-fidelity and ADM, exactly."""

import numpy as np
import pytest

from dinosae_jax.eval import precision_recall as module

PLAIN = ("torch_fidelity_full", "torch_fidelity_part64", "adm_fp32_chunk10000", "adm_fp32_chunk128")


@pytest.fixture(scope="module")
def recorded(data_dir):
    return np.load(data_dir / "metrics" / "precision_recall_cases.npz")


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("block", [1024, 96, 64])
def test_recorded_cases(recorded, case, block):
    reference, generated = recorded[f"{case}/ref"], recorded[f"{case}/gen"]
    scores = module.precision_recall(reference, generated, block=block)
    counts = np.asarray([len(generated), len(reference)])
    inside = np.round(np.asarray(scores) * counts)
    for name in PLAIN:  # torch-fidelity keeps its fractions in float32
        np.testing.assert_array_equal(
            inside, np.round(recorded[f"{case}/{name}_prec_rec"] * counts)
        )
    np.testing.assert_array_equal(scores, recorded[f"{case}/adm_fp32_chunk128_prec_rec"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_radii(recorded, case):
    for side in ("ref", "gen"):
        radii = module.squared_radii(recorded[f"{case}/{side}"], 64)
        expected = recorded[f"{case}/adm_fp32_radii_sq_{side}"][:, 0]
        np.testing.assert_allclose(radii, expected, rtol=1e-5)  # of float32 squares


@pytest.mark.parametrize("case", ["a", "b"])
def test_float16_distances_of_adm_move_few_points(recorded, case):
    reference, generated = recorded[f"{case}/ref"], recorded[f"{case}/gen"]
    scores = module.precision_recall(reference, generated, block=64)
    for chunk in (128, 10_000):
        adm = recorded[f"{case}/adm_fp16_chunk{chunk}_prec_rec"]
        np.testing.assert_allclose(scores, adm, atol=2 / min(len(reference), len(generated)))


def test_progress_counts_to_the_end():
    points = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    calls = []
    module.precision_recall(points, points[:30], progress=lambda *c: calls.append(c), block=16)
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[-1] == (len(calls), len(calls))


def test_far_away_samples_have_neither():
    points = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    assert module.precision_recall(points, points, block=16) == (1.0, 1.0)
    assert module.precision_recall(points, points + 100.0, block=16) == (0.0, 0.0)


def test_bad_input_is_one_clear_line():
    points = np.zeros((10, 4), np.float32)
    with pytest.raises(ValueError, match="at least 4 samples; got 3"):
        module.precision_recall(points[:3], points)
    with pytest.raises(ValueError, match=r"10000 reference and 50000 generated.*got 10 and 10"):
        module.precision_recall(points, points, "adm")
    with pytest.raises(ValueError, match="'plain' or 'adm'"):
        module.precision_recall(points, points, "vgg")
    with pytest.raises(ValueError, match="one dimension; got 4 and 3"):
        module.precision_recall(points, points[:, :3])
