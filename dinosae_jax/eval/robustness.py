"""How well a decoder handles tokens of another direction: PSNR over the angle of a rotation.

A flow's samples differ from latents of images by an angle, not by a length (the decode radius
restores that). So the noise that a decoder was trained with is judged by rotating every token of an
image by one angle, each in a random direction, and measuring the decoded image.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dinosae_jax.eval import image_quality
from dinosae_jax.flow import sphere

ANGLES = (0, 5, 10, 15, 20, 30, 45, 60, 75, 90)  # degrees


def turned_psnr(
    decode: Callable[[jax.Array], jax.Array],
    keys: jax.Array,
    tokens: jax.Array,
    images: jax.Array,
    degrees: ArrayLike,
) -> jax.Array:
    """PSNR of each image decoded from tokens that are turned by an angle; norms are kept.

    Args:
      decode: [b, n, d] float32 -> [b, h, w, 3]; clipped to [0, 1] here.
      keys: [b], one per image; the same keys turn in the same directions at every angle.
      tokens: [b, n, d] float32, the latents of the images.
      images: [b, h, w, 3] float32 in [0, 1].
      degrees: scalar, 0 to 90.

    Returns:
      [b] float32, dB, by image_quality's convention 'rae'.
    """
    turned = sphere.rotate(keys, tokens, jnp.deg2rad(jnp.asarray(degrees, jnp.float32)))
    return image_quality.psnr(jnp.clip(decode(turned), 0.0, 1.0), images)


def curve(
    measure: Callable[[float], ArrayLike], angles: tuple[float, ...] = ANGLES
) -> list[dict[str, float]]:
    """The rows of robustness.json: the mean of `measure(degrees)` -> [b] at each angle."""
    return [
        {"angle_degrees": float(angle), "psnr": float(np.mean(np.asarray(measure(angle))))}
        for angle in angles
    ]
