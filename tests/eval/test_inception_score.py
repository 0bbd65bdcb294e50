"""Inception Score against recorded values of ADM and torch-fidelity, and in closed form."""

import warnings

import numpy as np
import pytest

from dinosae_jax.eval import inception_score


def confident(classes, count=20):
    """Logits [n,count] that are all but certain of the given classes."""
    return 100.0 * np.eye(count, dtype=np.float32)[classes]


def test_certain_and_even_classes_score_their_number():
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 10))
    assert inception_score.inception_score_adm(confident(classes)) == pytest.approx(20.0)
    mean, spread = inception_score.inception_score_torch_fidelity(confident(classes), splits=1)
    assert (mean, spread) == pytest.approx((20.0, 0.0))


def test_a_network_that_knows_nothing_scores_one():
    logits = np.full((50, 20), 3.0, np.float32)
    assert inception_score.inception_score_adm(logits, 10) == pytest.approx(1.0)


def test_complete_recording(golden_dir):
    recorded = np.load(golden_dir / "metrics" / "inception_score.npz")
    logits = recorded["logits_f16"].astype(np.float32)
    for splits in (1, 10):
        for shuffle in (False, True):
            scores = inception_score.inception_score_torch_fidelity(logits, splits, shuffle)
            expected = recorded[f"tf_splits{splits}_shuffle{int(shuffle)}_mean_std"]
            np.testing.assert_allclose(scores, expected, rtol=1e-7, atol=1e-12)
    for size in (100, 5000):
        score = inception_score.inception_score_adm(logits, size)
        np.testing.assert_allclose(score, recorded[f"adm_split_size{size}"], rtol=1e-6)


def test_batches_sorted_by_class_are_warned_about():
    classes = np.repeat(np.arange(20), 10)
    with pytest.warns(UserWarning, match="sorted by class"):
        inception_score.inception_score_adm(confident(classes), 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shuffled = np.random.default_rng(0).permutation(classes)
        inception_score.inception_score_adm(confident(shuffled), 50)


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match="at least 10 samples; got 4"):
        inception_score.inception_score_torch_fidelity(np.zeros((4, 20)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        inception_score.inception_score_adm(np.full((4, 20), np.nan))
