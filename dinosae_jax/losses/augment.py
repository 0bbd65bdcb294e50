"""DiffAug: translation, colour and cutout on every image that the discriminator sees.

Mirrors RAE's class DiffAug with probability 1 (arXiv 2510.11690; method: Zhao et al.,
"Differentiable Augmentation for Data-Efficient GAN Training", arXiv 2006.10738). All randomness
enters as seven uniforms per image, so that the draws can depend on the image's index in the global
batch and not on how the batch is laid out over devices:

    row 0, 1   translation in y, x      rows 2, 3, 4   brightness, saturation, contrast
    row 5, 6   cutout in y, x

Images are in [-1, 1]; pixels that come from outside are 0, mid-grey. Results are not clipped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

NUM_UNIFORMS = 7


def augmentation_uniforms(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Draws the uniforms of each image from its index in the global batch.

    Args:
      key: random key of this step and purpose (real and fake images have different keys).
      indices: [b] int, the images' positions in the global batch.

    Returns:
      [7, b] float32 in [0, 1).
    """

    def draw(index: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, index), (NUM_UNIFORMS,))

    return jax.vmap(draw)(indices).T


def diff_augment(images: jax.Array, uniforms: jax.Array, cutout: float = 0.0) -> jax.Array:
    """Applies translation, colour and cutout, in this order, each image with its own uniforms.

    Args:
      images: [b, h, w, c] in [-1, 1].
      uniforms: [7, b] in [0, 1), see the module's docstring.
      cutout: side of the square that is blanked, as a fraction of the image's; 0 is none (RAE).

    Returns:
      [b, h, w, c] float32, differentiable with respect to the images.
    """

    def augment(image: jax.Array, r: jax.Array) -> jax.Array:
        return cut_out(jitter_colour(translate(image, r[:2]), r[2:5]), r[5:], cutout)

    return jax.vmap(augment, in_axes=(0, 1))(images.astype(jnp.float32), uniforms)


def translate(image: jax.Array, r: jax.Array) -> jax.Array:
    """Moves an image [h, w, c] by up to an eighth of its sides, zeros coming in; r is [2]."""
    limits = [round(side / 8) for side in image.shape[:2]]
    padded = jnp.pad(image, [(limit, limit) for limit in limits] + [(0, 0)])
    starts = jnp.floor(r * (2 * jnp.asarray(limits) + 1)).astype(jnp.int32)
    return jax.lax.dynamic_slice(padded, (starts[0], starts[1], 0), image.shape)


def jitter_colour(image: jax.Array, r: jax.Array) -> jax.Array:
    """Shifts brightness, then scales saturation and contrast of an image [h, w, c]; r is [3]."""
    image = image + (r[0] - 0.5)
    grey = image.mean(-1, keepdims=True)
    image = (image - grey) * (2.0 * r[1]) + grey
    mean = image.mean()
    return (image - mean) * (r[2] + 0.5) + mean


def cut_out(image: jax.Array, r: jax.Array, ratio: float) -> jax.Array:
    """Blanks a rectangle of `ratio` times the sides of an image [h, w, c]; r is [2]."""

    def inside(length: int, r: jax.Array) -> jax.Array:
        size = round(length * ratio)
        start = jnp.floor(r * (length + 1 - size % 2)) - size // 2
        offsets = jnp.arange(length) - start
        return (offsets >= 0) & (offsets < size)

    rows, columns = inside(image.shape[0], r[0]), inside(image.shape[1], r[1])
    return jnp.where((rows[:, None] & columns[None, :])[..., None], 0.0, image)
