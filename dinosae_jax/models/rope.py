"""DINOv3's axial rotary position embedding, in float32.

Patch centres lie in (-1, 1) along each axis of the grid; a head of width d has d/4 periods per
axis. Mirrors rope_position_encoding.py of facebookresearch/dinov3 in evaluation mode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def default_periods(head_dim: int, base: float = 100.0) -> Array:
    """Periods base^(2j / (d/2)), j = 0 .. d/4 - 1, of a head of width d.

    Released checkpoints store these rounded to bfloat16, and the stored values are used.

    Args:
      head_dim: width d of an attention head, a multiple of 4.
      base: ratio between the end of the range of periods and its start.

    Returns:
      [d/4] float32.

    Raises:
      ValueError: if head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(
            f"RoPE needs a head width that is a multiple of 4; got {head_dim}; change embed_dim "
            "or num_heads"
        )
    exponents = 2.0 * jnp.arange(head_dim // 4, dtype=jnp.float32) / (head_dim // 2)
    return base**exponents


def rope_table(periods: Array, height: int, width: int) -> tuple[Array, Array]:
    """Sine and cosine of the rotation angles of every patch of a grid.

    The angles of a patch are 2 pi y / period for all periods, then 2 pi x / period, and these
    d/2 values a second time.

    Args:
      periods: [d/4] float32.
      height: rows of the grid.
      width: columns of the grid.

    Returns:
      (sin, cos), each [height*width, d] float32, rows in row-major order of the grid.
    """
    y = 2.0 * (jnp.arange(height, dtype=jnp.float32) + 0.5) / height - 1.0
    x = 2.0 * (jnp.arange(width, dtype=jnp.float32) + 0.5) / width - 1.0
    grid = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), axis=-1).reshape(height * width, 2)
    angles = 2.0 * jnp.pi * grid[:, :, None] / periods.astype(jnp.float32)
    angles = jnp.tile(angles.reshape(height * width, -1), (1, 2))
    return jnp.sin(angles), jnp.cos(angles)


def prepend_identity(table: tuple[Array, Array], count: int) -> tuple[Array, Array]:
    """Adds `count` rows that rotate by nothing, for the tokens before the patches.

    Args:
      table: (sin, cos), each [n, d].
      count: number of class and storage tokens.

    Returns:
      (sin, cos), each [count+n, d].
    """
    sin, cos = table
    rows = (count, sin.shape[1])
    return (
        jnp.concatenate([jnp.zeros(rows, sin.dtype), sin]),
        jnp.concatenate([jnp.ones(rows, cos.dtype), cos]),
    )
