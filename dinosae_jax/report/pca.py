"""Feature maps as colours: three principal components of patch tokens (the paper's Figure 4).

Components are fitted once, on the teacher or on teacher and student together, and both are
projected with them. If each had its own components, a flipped sign or another order would look like
a difference.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinosae_jax.data import png
from dinosae_jax.report import pictures

Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Components:
    """Three whitened principal components of unit tokens.

    Attributes:
      mean: [d], the mean unit token.
      directions: [d, 3], orthonormal, by falling variance; the largest entry of each is positive.
      deviations: [3], the standard deviation along each.
    """

    mean: Float64
    directions: Float64
    deviations: Float64


def fit(tokens: ArrayLike) -> Components:
    """Fits three components to tokens [..., d], each first scaled to length 1.

    The length is ignored because the alignment loss, a cosine, does not depend on it.

    Raises:
      ValueError: fewer than 4 tokens, fewer than 3 dimensions, or a NaN or infinity.
    """
    unit = _unit(tokens).reshape(-1, np.shape(tokens)[-1])
    count, width = unit.shape
    if count < 4 or width < 3:
        raise ValueError(
            "three principal components need at least 4 tokens of 3 dimensions; "
            f"got {count} of {width}; pass more images"
        )
    mean = unit.mean(axis=0)
    values, vectors = np.linalg.eigh((unit - mean).T @ (unit - mean) / (count - 1))
    values, vectors = values[:-4:-1], vectors[:, :-4:-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    return Components(mean, vectors * np.sign(largest), np.sqrt(np.maximum(values, 1e-20)))


def colours(tokens: ArrayLike, components: Components) -> Float64:
    """Colours [..., 3] in [0, 1] of tokens [..., d]: the sigmoid of twice the projection."""
    projection = (_unit(tokens) - components.mean) @ components.directions
    return 1.0 / (1.0 + np.exp(-2.0 * projection / components.deviations))


def figure(
    images: ArrayLike, teacher: ArrayLike, student: ArrayLike, fitted_on: str = "teacher"
) -> png.Picture:
    """A figure of images, the teacher's feature maps and the student's, in three rows.

    Args:
      images: [b, H, W, 3] in [0, 1], H and W multiples of h and w.
      teacher: [b, h, w, d] patch tokens.
      student: [b, h, w, d] patch tokens of the same images.
      fitted_on: 'teacher', or 'joint' for both token sets together.

    Returns:
      uint8 [height, width, 3], one column per image.

    Raises:
      ValueError: unknown `fitted_on`, shapes that do not fit, or tokens that are not finite.
    """
    pixels, maps = np.asarray(images), [np.asarray(teacher), np.asarray(student)]
    if maps[0].shape != maps[1].shape or len(pixels) != len(maps[0]):
        raise ValueError(
            "teacher and student must have tokens [b, h, w, d] of the same b images; got "
            f"{list(maps[0].shape)} and {list(maps[1].shape)} for {len(pixels)} images; encode "
            "the same images with both"
        )
    if fitted_on not in ("teacher", "joint"):
        raise ValueError(
            f"components are fitted on 'teacher' or 'joint'; got {fitted_on!r}; choose one of them"
        )
    components = fit(maps[0] if fitted_on == "teacher" else np.stack(maps))
    scale = [pixels.shape[axis] // maps[0].shape[axis] for axis in (1, 2)]
    rows = [colours(tokens, components).repeat(scale[0], 1).repeat(scale[1], 2) for tokens in maps]
    return pictures.stack([pictures.grid(row, len(pixels)) for row in (pixels, *rows)])


def _unit(tokens: ArrayLike) -> Float64:
    array = np.asarray(tokens, np.float64)
    if not np.isfinite(array).all():
        raise ValueError("tokens must be finite; got NaN or infinity; check the weights")
    return array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12)
