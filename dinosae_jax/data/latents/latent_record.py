"""How the tokens of one image lie in a record of the latent cache.

Two formats: 'bfloat16', the tokens as they are but rounded; and 'int8', where each token's
direction is rounded to 8-bit numbers (the largest component is 127 or -127) and its norm is a
float16. The direction needs no scale of its own, since it has norm 1: a token is
norm * q / |q|, which `dequantise` computes on the device. A random direction in 1024 dimensions is
turned by 0.1 degrees in bfloat16, by 0.4 in int8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dinosae_jax import names

FORMATS: tuple[names.LatentFormat, ...] = get_args(names.LatentFormat)
LARGEST_NORM = float(np.finfo(np.float16).max)


class Field(NamedTuple):
    """One array of a record: little-endian, row-major."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in a record."""
        return self.dtype.itemsize * math.prod(self.shape)


def layout(stored: str, tokens: int, width: int) -> tuple[Field, ...]:
    """The fields of a record in their order.

    Args:
      stored: a name in `FORMATS`.
      tokens: n.
      width: d.

    Raises:
      ValueError: unknown format.
    """
    label = Field("label", np.dtype("<i4"), ())
    if stored == "bfloat16":
        return Field("latent", np.dtype(ml_dtypes.bfloat16), (tokens, width)), label
    if stored == "int8":
        direction = Field("direction", np.dtype(np.int8), (tokens, width))
        return direction, Field("norm", np.dtype("<f2"), (tokens,)), label
    raise ValueError(f"a latent format is one of {', '.join(FORMATS)}; got {stored!r}; take one")


def norms_of(tokens: NDArray[np.float32]) -> NDArray[np.float64]:
    """The norms of tokens [..., n, d], float64 [..., n].

    Raises:
      ValueError: a token is not finite, or longer than float16 can say.
    """
    norms = np.sqrt(np.einsum("...d,...d->...", tokens, tokens, dtype=np.float64))
    if not (norms < LARGEST_NORM).all():
        raise ValueError(
            f"latents must be finite with norms below {LARGEST_NORM:.0f}; got {norms.max()}; check "
            "the encoder's weights"
        )
    return norms


def pack(
    tokens: NDArray[np.float32],
    label: int,
    stored: str,
    norms: NDArray[np.float64] | None = None,
) -> bytes:
    """One record: tokens and label in a format of `FORMATS`, each field written in its place.

    Args:
      tokens: float32 [n, d].
      label: class of the image.
      stored: a name in `FORMATS`.
      norms: float64 [n], where they are known; `norms_of` otherwise.
    """
    fields = layout(stored, *tokens.shape)
    record = np.empty(sum(field.nbytes for field in fields), np.uint8)
    arrays = _places(record, fields)
    arrays["label"][...] = label
    if stored == "int8":
        largest = np.abs(tokens).max(axis=-1, keepdims=True)
        scaled = tokens * (127.0 / np.maximum(largest, 1e-30))
        arrays["direction"][...] = np.rint(scaled, out=scaled)
        arrays["norm"][...] = norms_of(tokens) if norms is None else norms
    else:
        arrays["latent"][...] = tokens
    return record.tobytes()


def _places(record: NDArray[np.uint8], fields: tuple[Field, ...]) -> dict[str, NDArray]:
    """The fields of a record as views of its bytes."""
    ends = np.cumsum([field.nbytes for field in fields])
    return {
        field.name: record[end - field.nbytes : end].view(field.dtype).reshape(field.shape)
        for field, end in zip(fields, ends, strict=True)
    }


def empty_batch(fields: tuple[Field, ...], size: int) -> dict[str, NDArray]:
    """Arrays [size, ...] that `unpack_into` fills."""
    return {field.name: np.zeros((size, *field.shape), field.dtype) for field in fields}


def unpack_into(
    record: bytes, fields: tuple[Field, ...], batch: Mapping[str, NDArray], row: int
) -> None:
    """Copies a record's fields into a row of a batch: the only copy that is made of it.

    Raises:
      ValueError: the record has another length.
    """
    if len(record) != sum(field.nbytes for field in fields):
        raise ValueError(
            f"a latent record holds {sum(field.nbytes for field in fields)} bytes; got "
            f"{len(record)}; encode again into an empty folder"
        )
    offset = 0
    for field in fields:
        array = batch[field.name]  # as bytes: NumPy copies bfloat16 number by number
        place = array.reshape(len(array), -1).view(np.uint8)[row]
        place[:] = np.frombuffer(record, np.uint8, field.nbytes, offset)
        offset += field.nbytes


def dequantise(direction: jax.Array, norm: jax.Array) -> jax.Array:
    """Tokens of their stored form, the way back from `pack` in int8: norm * q / |q|.

    Args:
      direction: int8 [b, n, d].
      norm: float16 [b, n].

    Returns:
      float32 [b, n, d].
    """
    rounded = direction.astype(jnp.float32)
    length = jnp.maximum(jnp.linalg.norm(rounded, axis=-1), 1.0)
    return rounded * (norm.astype(jnp.float32) / length)[..., None]
