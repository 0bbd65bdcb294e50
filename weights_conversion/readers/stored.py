"""Tensors that lie in a file until they are asked for, and the refusal of a file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from dinosae_jax.runtime.untrusted import short

__all__ = ["RefusedFileError", "StoredTensor", "is_absurd", "row_major_strides", "short", "span"]

MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**48


class RefusedFileError(ValueError):
    """A file that is damaged, hostile, or of another format; the message is one line."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file; `np.asarray` reads it.

    Attributes:
      path: The file.
      offset: Position of its first element, in bytes.
      dtype: numpy dtype (bfloat16 is `ml_dtypes.bfloat16`).
      shape: Shape in torch's layout.
      strides: Steps between elements, in elements, none negative.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to behind the last one."""
        return span(self.shape, self.strides)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self.path.open("rb") as file:
            flat = np.fromfile(file, self.dtype, self.span, offset=self.offset)
        if flat.size != self.span:
            raise RefusedFileError(f"{self.path.name} became shorter while it was read")
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        array = np.ndarray(self.shape, self.dtype, flat, strides=steps)
        return array if dtype is None else array.astype(dtype, copy=False)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of storage elements that a strided tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def is_absurd(shape: tuple[int, ...]) -> bool:
    """Whether numpy could not even describe it; an axis of 0 does not excuse the others."""
    elements = math.prod(max(size, 1) for size in shape)
    return len(shape) > MAX_DIMENSIONS or elements > MAX_ELEMENTS


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor whose last axis is contiguous."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
