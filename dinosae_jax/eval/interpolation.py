"""Nearest neighbours among latents, for the interpolated Frechet distance.

Each image's latent is moved half way to that of its nearest neighbour and decoded. The distance of
these images to real images measures how well the decoder handles points between latents of
images, where a flow's samples lie; the distance of reconstructions does not measure that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.eval.recipe import check_features

BLOCK = (2048, 8192)  # rows and columns of distances in memory at a time: 64 MiB


def nearest_neighbours(features: ArrayLike, block: tuple[int, int] = BLOCK) -> NDArray[np.int64]:
    """Index of the row nearest to each row other than itself; the first of equally near rows.

    Args:
      features: [n, d], n at least 2.
      block: rows and columns of distances in memory at a time.

    Returns:
      int64 [n].

    Raises:
      ValueError: layout, number or finiteness of the features.
    """
    array = check_features(features, 2, "the nearest neighbour").astype(np.float32, copy=False)
    array = array - array.mean(axis=0)  # distances stay, their float32 rounding gets smaller
    count = len(array)
    neighbours = np.zeros(count, np.int64)
    for top in range(0, count, block[0]):
        rows = np.arange(top, min(top + block[0], count))
        best = np.full(len(rows), np.inf, np.float32)
        for left in range(0, count, block[1]):
            columns = np.arange(left, min(left + block[1], count))
            nearest, distance = map(
                np.asarray, _nearest(array[rows], array[columns], rows, columns)
            )
            closer = distance < best
            neighbours[rows[closer]] = columns[nearest[closer]]
            best = np.minimum(best, distance)
    return neighbours


@jax.jit
def _nearest(
    u: jax.Array, v: jax.Array, rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Position and squared distance of the nearest column that is not the row itself."""
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(u * u, 1)[:, None] - 2.0 * product + jnp.sum(v * v, 1)[None]
    squares = jnp.where(rows[:, None] == columns[None], jnp.inf, squares)
    return jnp.argmin(squares, axis=1), jnp.min(squares, axis=1)
