"""Positions of the diffusion transformers: a fixed sin-cos table and two-axis rotary embedding.

Both follow LightningDiT and RAE, and disagree on the order of the axes: the sin-cos table gives its
first half of channels to the column, the rotary embedding gives its first half to the row. The
ViT's rotary embedding (half-split pairs, normalised coordinates) is in `rope`.
"""

from __future__ import annotations

import numpy as np


def sincos_table(grid: int, width: int) -> np.ndarray:
    """Fixed 2-D sin-cos position table of a square grid.

    Channels [0, width/2) encode the column, [width/2, width) the row; each half is
    [sin(p * w_k), cos(p * w_k)] with w_k = 10000^(-k / (width/4)). Mirrors the reference's
    `pos_embed` (MAE's table), which is a stored parameter there.

    Args:
      grid: tokens per side.
      width: number of channels, a multiple of 4.

    Returns:
      [grid * grid, width] float32 (computed in float64), row-major.

    Raises:
      ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(
            f"a sin-cos table needs a width divisible by 4; got {width}; change hidden_size"
        )
    frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    phases = [position[:, None] * frequency for position in (column, row)]
    halves = [f(phase) for phase in phases for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def rope_tables(grid: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the two-axis rotary embedding of a square grid.

    Channels [0, hd/2) rotate by the row, [hd/2, hd) by the column, with angles
    position * 10000^(-2j / (hd/2)), each repeated for the two neighbours of a pair
    (`VisionRotaryEmbeddingFast` of the reference, which keeps the tables as buffers).

    Args:
      grid: tokens per side.
      head_dim: channels per head, a multiple of 4.

    Returns:
      (cos, sin), each [grid * grid, head_dim] float32, row-major.

    Raises:
      ValueError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(
            f"rotary embedding needs a head width divisible by 4; got {head_dim}; change "
            "hidden_size or num_heads, or set use_rope=False"
        )
    frequency = 10000.0 ** (-2.0 * np.arange(head_dim // 4) / (head_dim / 2))
    row, column = np.divmod(np.arange(grid * grid), grid)
    pairs = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=1)
    angles = np.repeat(pairs, 2, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
