"""PSNR, SSIM and 8-bit conversion of images, each convention under its own name.

Values from different papers differ by convention before they differ by model: the 8-bit conversion
moves PSNR by 0.01 dB at 26 dB, the border rule moves SSIM in its second digit. So every convention
has a name, which is written with the value.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax import names

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
RAE_SMALLEST_MSE = 1e-10  # caps PSNR at 100 dB


def _truncate(images: jax.Array) -> jax.Array:
    return jnp.clip(images, 0.0, 1.0) * 255.0


def _round(images: jax.Array) -> jax.Array:
    return jnp.clip(images * 255.0 + 0.5, 0.0, 255.0)


def _round_signed(images: jax.Array) -> jax.Array:
    return jnp.clip(127.5 * (2.0 * images - 1.0) + 128.0, 0.0, 255.0)


UINT8_CONVERSIONS: dict[names.Uint8Conversion, Callable[[jax.Array], jax.Array]] = {
    "truncate": _truncate,
    "round": _round,
    "round_signed": _round_signed,
}


def to_uint8(images: jax.Array, conversion: str = "truncate") -> jax.Array:
    """Converts images to 8 bits by one of the three published rules.

    Args:
      images: floating point, nominally in [0, 1], any shape; values outside are clipped.
      conversion: 'truncate' is RAE's floor(255 x), which is 0.5 levels dark on average;
        'round' is EfficientViT's floor(255 x + 0.5); 'round_signed' is LightningDiT's
        floor(127.5 y + 128) on y = 2 x - 1, the same rule up to float32 rounding.

    Returns:
      uint8, the shape of `images`.

    Raises:
      ValueError: unknown conversion.
    """
    if conversion not in UINT8_CONVERSIONS:
        raise ValueError(
            f"8-bit conversion must be one of {', '.join(UINT8_CONVERSIONS)}; got {conversion!r}; "
            "choose one of these"
        )
    return UINT8_CONVERSIONS[conversion](images).astype(jnp.uint8)  # astype drops the fraction


def psnr(images: jax.Array, references: jax.Array, convention: str = "rae") -> jax.Array:
    """Peak signal-to-noise ratio of each image; papers report the mean of these decibels.

    Args:
      images: [b, h, w, c] in [0, 1]. Evaluations of 8-bit images pass `to_uint8(...) / 255`.
      references: [b, h, w, c] in [0, 1].
      convention: 'rae' clamps the mean squared error at 1e-10 from below, so equal images score
        100 dB; 'skimage' (also EfficientViT's and LightningDiT's) gives infinity there.

    Returns:
      [b] float32, dB.

    Raises:
      ValueError: unknown convention, or shapes that differ.
    """
    _check_pair(images, references)
    difference = images.astype(jnp.float32) - references.astype(jnp.float32)
    mean_squared_error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    if convention == "rae":
        mean_squared_error = jnp.maximum(mean_squared_error, RAE_SMALLEST_MSE)
    elif convention != "skimage":
        raise ValueError(
            f"PSNR convention must be 'rae' or 'skimage'; got {convention!r}; choose one of them"
        )
    return -10.0 * jnp.log10(mean_squared_error)


def ssim(images: jax.Array, references: jax.Array, convention: str = "rae") -> jax.Array:
    """Structural similarity of each image: Gaussian 11x11 window, sigma 1.5, data range 1.

    K1 is 0.01, K2 is 0.03, variances are biased, channels are averaged.

    Args:
      images: [b, h, w, c] in [0, 1].
      references: [b, h, w, c] in [0, 1].
      convention: 'rae' is torchmetrics' rule: borders reflected without repeating the edge, mean
        over the full image. 'skimage' is `structural_similarity(gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False)`: mean over the windows inside the image, that is without a
        border of 5 pixels. (skimage's default is a uniform 7x7 window, which gives other values.)

    Returns:
      [b] float32.

    Raises:
      ValueError: unknown convention, shapes that differ, or images smaller than the window.
    """
    _check_pair(images, references)
    radius = SSIM_WINDOW // 2
    smallest = {"rae": radius + 1, "skimage": SSIM_WINDOW}
    if convention not in smallest:
        raise ValueError(
            f"SSIM convention must be 'rae' or 'skimage'; got {convention!r}; choose one of them"
        )
    height, width = images.shape[1:3]
    if min(height, width) < smallest[convention]:
        raise ValueError(
            f"SSIM ({convention}) needs images of at least {smallest[convention]} pixels per side; "
            f"got {height} x {width}; enlarge them or leave SSIM out"
        )
    x, y = images.astype(jnp.float32), references.astype(jnp.float32)
    if convention == "rae":
        margin = ((0, 0), (radius, radius), (radius, radius), (0, 0))
        x, y = jnp.pad(x, margin, "reflect"), jnp.pad(y, margin, "reflect")
    return jnp.mean(_ssim_map(x, y), axis=(1, 2, 3))


def block_means(images: jax.Array, size: int = 16) -> jax.Array:
    """Replaces every block of size x size pixels by its mean: a baseline without a model.

    Args:
      images: [b, h, w, c] in [0, 1].
      size: side of a block in pixels; 16 is the autoencoder's patch.

    Returns:
      [b, h, w, c].

    Raises:
      ValueError: a height or width that `size` does not divide.
    """
    batch, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(
            f"block means need sides that are multiples of {size}; got {height} x {width}; crop "
            "them first"
        )
    blocks = images.reshape(batch, height // size, size, width // size, size, channels)
    means = jnp.mean(blocks, axis=(2, 4), keepdims=True)
    return jnp.broadcast_to(means, blocks.shape).reshape(images.shape)


def mean_colour(images: jax.Array) -> jax.Array:
    """Replaces every image [b, h, w, c] by its mean colour: the baseline of a collapsed model."""
    means = jnp.mean(images, axis=(1, 2), keepdims=True)
    return jnp.broadcast_to(means, images.shape)


def _check_pair(images: jax.Array, references: jax.Array) -> None:
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(
            "images and references must both be [b, h, w, c] of one shape; got "
            f"{list(images.shape)} and {list(references.shape)}; crop or resize one of them"
        )


def _ssim_map(x: jax.Array, y: jax.Array) -> jax.Array:
    """SSIM of every window that lies inside the image: [b, h-10, w-10, c]."""
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    # Second moments around a common level: in float32 the small variances of a bright flat area
    # would drown in E[x^2] - E[x]^2 otherwise.
    level = jnp.mean(y, axis=(1, 2), keepdims=True)
    x0, y0 = x - level, y - level
    mean_x0, mean_y0 = _blur(x0), _blur(y0)
    variance_x = jnp.maximum(_blur(x0 * x0) - mean_x0 * mean_x0, 0.0)
    variance_y = jnp.maximum(_blur(y0 * y0) - mean_y0 * mean_y0, 0.0)
    covariance = _blur(x0 * y0) - mean_x0 * mean_y0
    mean_x, mean_y = mean_x0 + level, mean_y0 + level
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2.0 * covariance + c2) / (variance_x + variance_y + c2)


def _blur(x: jax.Array) -> jax.Array:
    """Separable Gaussian window without padding, as eleven shifted sums per axis."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = (weights / weights.sum()).tolist()
    for axis in (1, 2):
        valid = x.shape[axis] - SSIM_WINDOW + 1
        x = sum(
            (
                weight * jax.lax.slice_in_dim(x, start, start + valid, axis=axis)
                for start, weight in enumerate(weights)
            ),
            start=jnp.zeros((), x.dtype),
        )
    return x
