"""Frechet distance between two sets of features, each taken as a Gaussian, in float64.

FID is this distance on Inception's pool3 features, sFID on its 2023 spatial features; in any other
feature space it has another name. Statistics merge, so that each host and each batch can have its
own.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.data import adm_npz
from dinosae_jax.eval.recipe import Recipe, check_comparable, check_features, check_pair
from dinosae_jax.runtime import files

Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mergeable first and second moments of features.

    Attributes:
      count: number n of samples.
      mean: [d] float64.
      scatter: [d, d] float64, the sum of (x - mean)(x - mean)^T.
      recipe: what made the features.
    """

    count: int
    mean: Float64
    scatter: Float64
    recipe: Recipe

    @property
    def covariance(self) -> Float64:
        """The unbiased covariance, scatter / (n - 1)."""
        return self.scatter / (self.count - 1)


def statistics(features: ArrayLike, recipe: Recipe) -> Statistics:
    """Moments of features [n, d] in float64; one row is enough for a part that will be merged.

    Raises:
      ValueError: not [n, d], empty, or not finite.
    """
    array = check_features(features, 1, "Frechet distance").astype(np.float64)
    mean = array.mean(axis=0)
    array -= mean
    count = len(array)
    return Statistics(count, mean, array.T @ array, dataclasses.replace(recipe, count=count))


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Moments of two disjoint sets together (Chan, Golub and LeVeque's pairwise update).

    Raises:
      ValueError: the recipes cannot be compared.
    """
    check_comparable(first.recipe, second.recipe)
    count = first.count + second.count
    shift = second.mean - first.mean
    mean = first.mean + shift * (second.count / count)
    scatter = first.scatter + second.scatter
    scatter += np.outer(shift, shift) * (first.count * second.count / count)
    return Statistics(count, mean, scatter, dataclasses.replace(first.recipe, count=count))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) from moments.

    The root's trace is the sum of the root eigenvalues of H S2 H with H = S1^(1/2), which stays
    symmetric: real, and exact to rounding where the general matrix root is not.

    Args:
      first: moments of at least 2 samples.
      second: moments of at least 2 samples.

    Returns:
      The distance. With fewer samples than dimensions it may be negative by 1e-6 near zero.

    Raises:
      ValueError: other recipes, other dimensions, or fewer than 2 samples.
    """
    check_comparable(first.recipe, second.recipe)
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            "Frechet distance needs features of one dimension; "
            f"got {first.mean.shape[0]} and {second.mean.shape[0]}; use one tap for both"
        )
    for side in (first, second):
        _check_count(side.count, len(side.mean))
    values, vectors = np.linalg.eigh(first.covariance)
    half = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = half @ second.covariance @ half
    root_trace = np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0.0)))
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(np.sum((first.mean - second.mean) ** 2) + traces - 2.0 * root_trace)


def frechet_distance_of_few(first: ArrayLike, second: ArrayLike) -> float:
    """The same distance from the features themselves, exact also for fewer samples than dimensions.

    The root's trace is the nuclear norm of A B^T, where A and B are the centred features divided
    by sqrt(n - 1); no covariance is formed. Cost grows with n1 n2 d + n1 n2 min(n1, n2).

    Args:
      first: [n1, d], n1 at least 2.
      second: [n2, d], n2 at least 2.

    Raises:
      ValueError: layout, number, dimensions or finiteness of the features.
    """
    pair = check_pair(first, second, 2, "Frechet distance")
    arrays = [side.astype(np.float64) for side in pair]
    means = [array.mean(axis=0) for array in arrays]
    a, b = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in zip(arrays, means, strict=True))
    root_trace = np.sum(np.linalg.svd(a @ b.T, compute_uv=False))
    return float(
        np.sum((means[0] - means[1]) ** 2) + np.sum(a * a) + np.sum(b * b) - 2.0 * root_trace
    )


def write_statistics(path: epath.Path, moments: Statistics) -> None:
    """Writes moments and their recipe as .npz."""
    with files.publishing(path) as partial:
        np.savez(
            partial,
            mean=moments.mean,
            scatter=moments.scatter,
            count=moments.count,
            recipe=moments.recipe.to_json(),
        )


def read_statistics(path: epath.Path) -> Statistics:
    """Reads what `write_statistics` wrote.

    Raises:
      ValueError: the file lacks a member, or the members are no moments.
    """
    with adm_npz.open_members(path) as archive:
        missing = {"mean", "scatter", "count", "recipe"} - set(archive.files)
        if missing:
            raise ValueError(
                "a file of moments holds mean, scatter, count and recipe; got "
                f"{path} without {', '.join(sorted(missing))}; write it with write_statistics, or "
                "read it with adm_moments if it is a reference"
            )
        recipe = Recipe.from_json(str(archive["recipe"]))
        mean, scatter = (np.asarray(archive[name], np.float64) for name in ("mean", "scatter"))
        check_moments(path, mean, scatter)
        return Statistics(int(archive["count"]), mean, scatter, recipe)


def check_moments(path: epath.Path, mean: Float64, scatter: Float64) -> None:
    """Raises ValueError unless mean [d] and scatter or covariance [d, d] fit and are finite."""
    if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path} must hold a mean [d] and moments [d, d]; got {list(mean.shape)} and "
            f"{list(scatter.shape)}; the file is damaged, make it again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
        raise ValueError(f"{path} must hold finite moments; got NaN or infinity; make it again")


def _check_count(count: int, dimensions: int) -> None:
    if count < 2:
        raise ValueError(f"Frechet distance needs at least 2 samples; got {count}; make more")
    if count <= dimensions:
        warnings.warn(
            f"Frechet distance of {count} samples in {dimensions} dimensions has a large bias; "
            f"compare it only at equal counts, or make more than {dimensions} samples",
            stacklevel=3,
        )
