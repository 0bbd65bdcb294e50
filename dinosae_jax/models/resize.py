"""Resizing of images and position tables as PyTorch does it.

A resize is two matrix products with constant matrices. The encoders' references use three filters
of `torch.nn.functional.interpolate` (align_corners False): bicubic with four taps and clamped
borders (a = -0.75), and bicubic (a = -0.5) or bilinear with antialiasing, whose support grows with
the shrink factor and whose weights are renormalised at the borders. torch computes the source
coordinates in float32, which moves a 256 to 224 resize by 1e-4; so does this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax import names

Array = jax.Array


def resize(images: Array, size: tuple[int, int], method: names.Resize) -> Array:
    """Resizes images.

    Args:
      images: [b, h, w, c] float.
      size: height and width of the result.
      method: 'bicubic', 'bicubic_antialias', 'bilinear' or 'bilinear_antialias'.

    Returns:
      [b, *size, c] float32; the images themselves, in float32, where they have that size.
    """
    if images.shape[1:3] == tuple(size):
        return images.astype(jnp.float32)
    rows, columns = (
        weights(before, after, method)
        for before, after in zip(images.shape[1:3], size, strict=True)
    )
    return _apply(images, rows, columns)


def resize_table(table: Array, size: tuple[int, int], method: names.TableResize) -> Array:
    """Resizes a square table of positions to a grid.

    Args:
      table: [g, g, d] float32.
      size: height and width of the grid.
      method: 'bicubic' or 'bicubic_antialias' as for images; 'bicubic_offset' is the rule of
        facebookresearch/dinov2 for models without registers, bicubic with the factor
        (n + 0.1) / g instead of n / g.

    Returns:
      [*size, d] float32; the table itself where it has that size.
    """
    side = table.shape[0]
    if tuple(size) == (side, side):
        return table
    if method == "bicubic_offset":
        rows, columns = (_four_taps(side, n, side / (n + 0.1)) for n in size)
    else:
        rows, columns = (weights(side, n, method) for n in size)
    return _apply(table[None], rows, columns)[0]


def weights(before: int, after: int, method: names.Resize) -> np.ndarray:
    """The matrix [after, before] float32 that resizes one axis."""
    match method:
        case "bicubic":
            return _four_taps(before, after, before / after)
        case "bilinear":
            return _two_taps(before, after)
        case "bicubic_antialias":
            return _antialiased(before, after, _cubic, 2.0)
        case "bilinear_antialias":
            return _antialiased(before, after, _triangle, 1.0)


def _apply(images: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    images = images.astype(jnp.float32)
    across = jnp.einsum("xw,bhwc->bhxc", columns, images, precision="highest")
    return jnp.einsum("yh,bhxc->byxc", rows, across, precision="highest")


def _centres(after: int, scale: float) -> np.ndarray:
    """Where the centres of the new pixels lie among the old, in float32."""
    return np.float32(scale) * (np.arange(after, dtype=np.float32) + np.float32(0.5))


def _four_taps(before: int, after: int, scale: float) -> np.ndarray:
    position = _centres(after, scale) - np.float32(0.5)
    first = np.floor(position)
    past = position - first
    taps = np.stack([past + 1, past, 1 - past, 2 - past])
    found = np.zeros((after, before), np.float32)
    for offset, values in zip((-1, 0, 1, 2), _cubic(taps, -0.75), strict=True):
        at = np.clip(first.astype(int) + offset, 0, before - 1)
        np.add.at(found, (np.arange(after), at), values.astype(np.float32))
    return found


def _two_taps(before: int, after: int) -> np.ndarray:
    position = np.maximum(_centres(after, before / after) - np.float32(0.5), 0)
    first = np.floor(position)
    past = position - first
    found = np.zeros((after, before), np.float32)
    for offset, values in ((0, 1 - past), (1, past)):
        at = np.clip(first.astype(int) + offset, 0, before - 1)
        np.add.at(found, (np.arange(after), at), values)
    return found


def _antialiased(before: int, after: int, kernel, support: float) -> np.ndarray:
    scale = np.float32(before / after)
    stretch = max(scale, np.float32(1))
    centres = _centres(after, before / after)[:, None]
    reach = np.float32(support) * stretch
    first = np.maximum((centres - reach + np.float32(0.5)).astype(int), 0)
    end = np.minimum((centres + reach + np.float32(0.5)).astype(int), before)
    index = np.arange(before)
    values = kernel((index - centres + np.float32(0.5)) * (1 / stretch))
    values = np.where((first <= index) & (index < end), values, 0)
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)
