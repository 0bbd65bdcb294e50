"""Inception Score by two recipes; both take Inception's 1008 logits *without* their bias."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.eval.recipe import check_features

ADM_SPLIT_SIZE = 5000
TORCH_FIDELITY_SPLITS = 10
TORCH_FIDELITY_SEED = 2020


def inception_score_adm(logits: ArrayLike, split_size: int = ADM_SPLIT_SIZE) -> float:
    """Inception Score as in ADM's evaluator: consecutive splits of 5,000, not shuffled.

    ADM computes in float32, this in float64; they agree to 1e-6.

    Args:
      logits: [n, 1008], in the order of the archive. If they are sorted by class the score is
        meaningless, because each split then holds few classes, and a warning says so.
      split_size: images in a split.

    Returns:
      The mean over splits.

    Raises:
      ValueError: layout, number or finiteness of the logits.
    """
    array = check_features(logits, 2, "Inception Score")
    if len(array) > split_size and looks_sorted_by_class(array):
        warnings.warn(
            "Inception Score (ADM) is meaningless for samples sorted by class; got neighbours of "
            "one class; shuffle the archive or use the torch-fidelity recipe",
            stacklevel=2,
        )
    starts = range(0, len(array), split_size)
    return float(np.mean([_score(array[start : start + split_size]) for start in starts]))


def inception_score_torch_fidelity(
    logits: ArrayLike, splits: int = TORCH_FIDELITY_SPLITS, shuffle: bool = True
) -> tuple[float, float]:
    """Inception Score as in torch-fidelity: shuffled by seed 2020, in 10 equal splits.

    Args:
      logits: [n, 1008].
      splits: number of splits, at most n.
      shuffle: whether to permute first, with NumPy's legacy generator at seed 2020.

    Returns:
      Mean and population standard deviation over the splits.

    Raises:
      ValueError: layout, number or finiteness of the logits.
    """
    array = check_features(logits, max(2, splits), "Inception Score")
    count = len(array)
    if shuffle:
        array = array[np.random.RandomState(TORCH_FIDELITY_SEED).permutation(count)]
    bounds = [(i * count // splits, (i + 1) * count // splits) for i in range(splits)]
    scores = [_score(array[start:stop]) for start, stop in bounds]
    return float(np.mean(scores)), float(np.std(scores))


def looks_sorted_by_class(logits: NDArray[np.floating]) -> bool:
    """Whether neighbours share their likeliest class far more often than chance lets them."""
    classes = np.argmax(logits, axis=1)
    shares = np.bincount(classes) / len(classes)
    agreement = np.mean(classes[1:] == classes[:-1])
    return bool(agreement > 0.1 + 3.0 * np.sum(shares**2))


def _score(logits: NDArray[np.floating]) -> float:
    """The exponential of the mean divergence between p(y|x) and its mean over the split."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=1, keepdims=True)
    log_p = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
    p = np.exp(log_p)
    log_mean = np.log(np.maximum(np.mean(p, axis=0), np.finfo(np.float64).tiny))
    return float(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
