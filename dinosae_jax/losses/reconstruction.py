"""Pixel losses between images in [0, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def l1(reconstruction: jax.Array, image: jax.Array) -> jax.Array:
    """Mean absolute error over all elements, the L1 term of the paper's eq. 7.

    Args:
      reconstruction: float32 [b, h, w, c], not clipped.
      image: float32 [b, h, w, c] in [0, 1].

    Returns:
      float32 [].
    """
    return jnp.mean(jnp.abs(reconstruction - image))
