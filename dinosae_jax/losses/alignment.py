"""Alignment of the student's patch tokens with the frozen teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMALLEST_NORM = 1e-8


def cosine_similarity(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Cosine over the channel axis; each norm is clamped from below at 1e-8, as torch does.

    Args:
      student: float32 [..., d].
      teacher: float32 [..., d].

    Returns:
      float32 [...] in [-1, 1].
    """
    product = jnp.sum(student * teacher, axis=-1)
    return product / (_norm(student) * _norm(teacher))


def cosine(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cos(z_S, z_T), mean over tokens and batch: L_align, the paper's eq. 6.

    Args:
      student: float32 [b, n, d], patch tokens after the final norm.
      teacher: float32 [b, n, d].

    Returns:
      float32 [] in [0, 2].
    """
    return 1.0 - jnp.mean(cosine_similarity(student, teacher))


def mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared error over all elements: the alignment that the paper argues against.

    Args:
      student: float32 [b, n, d].
      teacher: float32 [b, n, d].

    Returns:
      float32 [].
    """
    return jnp.mean(jnp.square(student - teacher))


def _norm(tokens: jax.Array) -> jax.Array:
    # The square is clamped, so that the norm's gradient at a zero token is zero and not NaN.
    squared = jnp.sum(jnp.square(tokens), axis=-1)
    return jnp.sqrt(jnp.maximum(squared, SMALLEST_NORM**2))
