"""Improved precision and recall (arXiv 1904.06991) in memory that does not grow with n^2.

A point's ball reaches to its k-th nearest other point of its own set. Precision is the fraction of
generated points inside a ball of the reference, recall the fraction of reference points inside a
ball of the generated set. The balls depend on the counts, so values compare only at equal counts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.eval.recipe import check_pair

NEIGHBOURS = 3
ADM_COUNTS = (10_000, 50_000)  # reference, generated
BLOCK = 2048  # rows and columns of distances in memory at a time: 16 MiB

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]


def precision_recall(
    reference: ArrayLike,
    generated: ArrayLike,
    protocol: str = "plain",
    progress: Progress | None = None,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Precision and recall with k = 3 and distances in float32 (ADM's own are float16).

    Args:
      reference: [n, d], real images.
      generated: [m, d], samples.
      protocol: 'adm' requires 10,000 reference and 50,000 generated images, so that recall's
        balls are smaller than precision's; 'plain' takes any counts, commonly equal.
      progress: called as progress(blocks done, blocks in all).
      block: rows and columns of distances in memory at a time.

    Returns:
      (precision, recall).

    Raises:
      ValueError: unknown protocol, counts it does not allow, or layout, dimensions and finiteness
        of the features.
    """
    pair = check_pair(reference, generated, NEIGHBOURS + 1, "precision and recall")
    sets = [side.astype(np.float32, copy=False) for side in pair]
    counts = (len(sets[0]), len(sets[1]))
    if protocol not in ("plain", "adm"):
        raise ValueError(
            f"precision and recall protocol must be 'plain' or 'adm'; got {protocol!r}; choose "
            "one of them"
        )
    if protocol == "adm" and counts != ADM_COUNTS:
        raise ValueError(
            "ADM's precision and recall needs 10000 reference and 50000 generated images; "
            f"got {counts[0]} and {counts[1]}; use the 'plain' protocol or make as many"
        )
    centre = sets[0].mean(axis=0)  # distances do not change, float32 rounding gets smaller
    real, fake = (side - centre for side in sets)
    tick = _ticker(progress, *(len(_slices(count, block)) for count in counts))
    radii = [squared_radii(side, block, tick) for side in (real, fake)]
    covered_fake = np.zeros(counts[1], bool)
    covered_real = np.zeros(counts[0], bool)
    for rows in _slices(counts[1], block):
        for columns in _slices(counts[0], block):
            in_real, in_fake = _covered(
                _distances(fake, real, rows, columns, block),
                _padded(radii[1][rows], block, -1.0),
                _padded(radii[0][columns], block, -1.0),
            )
            covered_fake[rows] |= np.asarray(in_real)[: rows.stop - rows.start]
            covered_real[columns] |= np.asarray(in_fake)[: columns.stop - columns.start]
            tick()
    return float(covered_fake.mean()), float(covered_real.mean())


def squared_radii(
    features: Float32, block: int = BLOCK, tick: Callable[[], None] = lambda: None
) -> Float32:
    """Squared distance [n] of each row of features [n, d] to its 3rd nearest other row.

    Distances are symmetric, so each block is computed once and read both ways.
    """
    parts = _slices(len(features), block)
    nearest = [jnp.full((block, NEIGHBOURS + 1), jnp.inf)] * len(parts)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts[i:], i):
            distances = _distances(features, features, rows, columns, block)
            nearest[i] = _nearest(distances, nearest[i])  # includes the row itself, at distance 0
            if j > i:  # then the block's rows are all real, only columns are padded
                nearest[j] = _nearest(distances.T, nearest[j])
            tick()
    radii = np.concatenate([np.asarray(rows)[:, NEIGHBOURS] for rows in nearest])
    return radii[: len(features)]


def _slices(count: int, block: int) -> list[slice]:
    return [slice(top, min(top + block, count)) for top in range(0, count, block)]


def _distances(
    first: Float32, second: Float32, rows: slice, columns: slice, block: int
) -> jax.Array:
    """Squared distances [block, block] of rows to columns; padded columns are infinitely far."""
    u, v = _padded(first[rows], block, 0.0), _padded(second[columns], block, 0.0)
    return _squared_distances(u, v, columns.stop - columns.start)


@jax.jit
def _squared_distances(u: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(u * u, 1)[:, None] + jnp.sum(v * v, 1)[None] - 2.0 * product
    return jnp.where(jnp.arange(len(v)) < valid, jnp.maximum(squares, 0.0), jnp.inf)


@jax.jit
def _nearest(distances: jax.Array, nearest: jax.Array) -> jax.Array:
    """The smallest k + 1 distances of each row, in order, so far and in this block."""
    closest = -jax.lax.top_k(-distances, NEIGHBOURS + 1)[0]
    return jnp.sort(jnp.concatenate([nearest, closest], axis=1), axis=1)[:, : NEIGHBOURS + 1]


@jax.jit
def _covered(
    distances: jax.Array, row_radii: jax.Array, column_radii: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which rows lie in a column's ball, and which columns in a row's; ties are inside."""
    in_columns = jnp.any(distances <= column_radii[None], axis=1)
    in_rows = jnp.any(distances <= row_radii[:, None], axis=0)
    return in_columns, in_rows


def _padded(array: Float32, length: int, value: float) -> Float32:
    if len(array) == length:
        return array
    margin = [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, margin, constant_values=value)


def _ticker(progress: Progress | None, real: int, fake: int) -> Callable[[], None]:
    """Counts the blocks of both sets' radii and of the distances between the sets."""
    if progress is None:
        return lambda: None
    total = real * (real + 1) // 2 + fake * (fake + 1) // 2 + real * fake
    steps = iter(range(1, total + 1))
    return lambda: progress(next(steps), total)
