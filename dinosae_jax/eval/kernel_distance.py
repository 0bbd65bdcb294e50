"""Kernel distance (KID): unbiased squared MMD with a cubic kernel, and its spread over subsets."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.eval.recipe import check_pair

SUBSETS, SUBSET_SIZE = 100, 1000
SEED = 2020


def kernel_distance(
    first: ArrayLike, second: ArrayLike, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """KID with the subsets that torch-fidelity draws (NumPy's legacy generator, seed 2020).

    The kernel is (x.y / d + 1)^3. Unlike the Frechet distance the estimate has no bias at few
    samples, so it may be negative.

    Args:
      first: [n1, d].
      second: [n2, d].
      subsets: number of pairs of subsets.
      subset_size: samples in a subset, 2 to min(n1, n2).

    Returns:
      Mean and population standard deviation over the subsets.

    Raises:
      ValueError: layout, number, dimensions or finiteness of the features, or subsets of fewer
        than 2 samples.
    """
    if subset_size < 2:
        raise ValueError(
            f"KID averages over pairs, so a subset holds at least 2 samples; got {subset_size}; "
            f"{SUBSET_SIZE} is the usual size"
        )
    x, y = check_pair(first, second, subset_size, "KID")
    generator = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        rows = [generator.choice(len(side), subset_size, replace=False) for side in (x, y)]
        values.append(squared_mmd(x[rows[0]], y[rows[1]]))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """The unbiased squared maximum mean discrepancy of features [n, d] and [m, d], cubic kernel."""
    u, v = x.astype(np.float64), y.astype(np.float64)
    within = _mean_off_diagonal(_kernel(u, u)) + _mean_off_diagonal(_kernel(v, v))
    return float(within - 2.0 * np.mean(_kernel(u, v)))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _mean_off_diagonal(kernel: NDArray[np.float64]) -> float:
    count = len(kernel)
    return float((np.sum(kernel) - np.trace(kernel)) / (count * (count - 1)))
