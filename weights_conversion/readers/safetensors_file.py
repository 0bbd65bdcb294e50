"""Reads and writes .safetensors tensor by tensor, in every dtype and in the order of the keys.

The format: 8 bytes with the length of a JSON header, the header {key: {dtype, shape,
data_offsets}}, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from weights_conversion.readers.stored import (
    RefusedFileError,
    StoredTensor,
    is_absurd,
    row_major_strides,
    short,
)

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 65_536
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the header of a file.

    Args:
      path: A .safetensors file.

    Returns:
      The tensors by key, not read yet, and the header's free text metadata.

    Raises:
      RefusedFileError: The file is truncated, damaged or has a dtype that we do not know.
    """
    path = Path(path)
    try:
        return _read(path)
    except RefusedFileError as error:
        raise RefusedFileError(
            f"{short(path.name)}: a safetensors file is a header and tensors without gaps; got a "
            f"file of which {error}; download it again"
        ) from None


def _read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise RefusedFileError("the header is no safetensors header, or is truncated")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise RefusedFileError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise RefusedFileError("the header is not a dictionary")
    if len(header) > MAX_TENSORS:
        raise RefusedFileError(f"the header lists {len(header)} tensors, more than {MAX_TENSORS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise RefusedFileError("the header's metadata is not a dictionary")
    start = 8 + length
    found = [_entry(path, start, key, entry) for key, entry in header.items()]
    position = start
    for _, tensor, end in sorted(found, key=lambda item: (item[1].offset, item[2])):
        if tensor.offset != position:
            raise RefusedFileError("the tensors overlap or leave gaps")
        position = end
    if position != size:
        raise RefusedFileError("the end is truncated, or longer than its tensors")
    return {key: tensor for key, tensor, _ in found}, metadata


def _entry(path: Path, start: int, key: str, entry: Any) -> tuple[str, StoredTensor, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise RefusedFileError(f"the header's entry of {short(key)} is damaged") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RefusedFileError(f"{short(key)} has dtype {short(dtype)}, which is not supported")
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if (
        not whole
        or is_absurd(tuple(shape))
        or math.prod(shape) * DTYPES[dtype].itemsize != (end - begin)
    ):
        raise RefusedFileError(f"the shape of {short(key)} does not fit its bytes")
    strides = row_major_strides(tuple(shape))
    tensor = StoredTensor(path, start + begin, DTYPES[dtype], tuple(shape), strides)
    return key, tensor, start + end


def write_safetensors(
    path: str | Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]],
    metadata: dict[str, str],
) -> None:
    """Writes tensors one at a time, in the given order.

    Args:
      path: The file; it appears when it is complete.
      tensors: (key, numpy dtype name, shape, function that returns the array) each.
      metadata: Free text for the header.
    """
    path = Path(path)
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, dtype, shape, _ in tensors:
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        name = _NAMES[np.dtype(dtype)]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, dtype, shape, make in tensors:
            array = np.ascontiguousarray(make())
            if (str(array.dtype), array.shape) != (dtype, tuple(shape) or (1,)):
                raise ValueError(
                    f"{short(key)} must be {dtype} {list(shape)}; got {array.dtype} "
                    f"{list(array.shape)}; convert the weights again"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
    part.replace(path)
