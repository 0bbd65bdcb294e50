"""Images as each encoder family wants them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dinosae_jax import names
from dinosae_jax.encoders import Preprocessing
from dinosae_jax.models import resize

Array = jax.Array


def prepare(images: Array, how: Preprocessing, patch_size: int = names.PATCH_SIZE) -> Array:
    """The input of a network whose patches have another side than a token's 16 pixels.

    An encoder with patches of 14 pixels looks at the image resized by 14/16, so that its grid is
    that of a stem of stride 16.

    Args:
      images: [b, h, w, 3] in [0, 1].
      how: the family's preprocessing.
      patch_size: of the network.

    Returns:
      [b, h * patch_size / 16, w * patch_size / 16, 3] float32, normalised, sides rounded down.
    """
    height, width = (side * patch_size // names.PATCH_SIZE for side in images.shape[1:3])
    return fit(images, how, (height, width))


def fit(images: Array, how: Preprocessing, size: tuple[int, int]) -> Array:
    """Resizes images [b, h, w, 3] in [0, 1] and normalises them, in the order of the family."""
    mean, std = jnp.array(how.mean), jnp.array(how.std)
    if how.resize_first:
        return (resize.resize(images, size, how.resize) - mean) / std
    return resize.resize((images.astype(jnp.float32) - mean) / std, size, how.resize)
