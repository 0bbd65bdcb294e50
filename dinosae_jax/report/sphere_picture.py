"""What the decoder makes of the two parts of a latent: its tokens' norms and their directions.

The flow moves directions on a sphere and leaves norms alone, because the picture is to a large part
in the directions. One sheet shows how far that holds for a decoder: in its first row the norms of
all tokens change and no direction does, in the others the directions change and no norm does.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from dinosae_jax.data import png
from dinosae_jax.flow import sphere
from dinosae_jax.report import pictures

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5)  # of the norms
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way to the other image's directions
ANGLES = (0, 15, 30, 45, 60)  # degrees, each token in a random direction


def moved_latents(z: jax.Array, other: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """The latents of each row of the sheet.

    Args:
      z: [n, d] float32, latent of an image.
      other: [n, d] float32, latent of another image; only its directions are used.
      key: of the random directions, the same at every angle.

    Returns:
      "norm", "other" and "noise" -> [5, n, d] float32 for `FACTORS`, `PARTS` and `ANGLES`; in all
      but the first every token keeps its norm.
    """
    rows = jnp.broadcast_to(z, (len(FACTORS), *z.shape))
    keys = jnp.broadcast_to(key, (len(FACTORS), *key.shape))
    factors, parts, degrees = (jnp.asarray(row, jnp.float32) for row in (FACTORS, PARTS, ANGLES))
    return {
        "norm": rows * factors[:, None, None],
        "other": sphere.geodesic(rows, jnp.broadcast_to(other, rows.shape), parts),
        "noise": sphere.rotate(keys, rows, jnp.deg2rad(degrees)),
    }


def draw(
    decode: Callable[[jax.Array], ArrayLike], z: jax.Array, other: jax.Array, key: jax.Array
) -> png.Picture:
    """The sheet: one captioned row for each way in which the latent moves.

    Args:
      decode: [b, n, d] float32 -> [b, h, w, 3] in about [0, 1]; clipped here. Called once.
      z: [n, d] float32, latent of an image.
      other: [n, d] float32, latent of another image.
      key: of the random directions.

    Returns:
      uint8 [H, W, 3], rows in the order of `moved_latents`.
    """
    moved = moved_latents(z, other, key)
    images = pictures.enlarged(decode(jnp.concatenate(list(moved.values()))))
    captions = (
        "norms times " + _listed(FACTORS) + "; directions kept",
        "directions " + _listed(PARTS) + " of the way to another image's; norms kept",
        "directions turned at random by " + _listed(ANGLES) + " degrees; norms kept",
    )
    columns = len(FACTORS)
    rows = [
        pictures.captioned(pictures.grid(images[start : start + columns], columns), caption)
        for start, caption in zip(range(0, len(images), columns), captions, strict=True)
    ]
    return pictures.stack(rows)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
