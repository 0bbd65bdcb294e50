"""What both formats of torch share: the globals of their pickles, and tensors over storages."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from weights_conversion.readers.pickle_machine import Class, Function, check_key, interpret
from weights_conversion.readers.stored import (
    MAX_ELEMENTS,
    RefusedFileError,
    StoredTensor,
    is_absurd,
    short,
    span,
)

MAX_PICKLE_BYTES = 1 << 24

STORAGES = {
    "BoolStorage": np.dtype(bool),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of `numel` elements that begins `offset` bytes into the file."""

    dtype: np.dtype
    offset: int
    numel: int


def unpickle(path: Path, stream: io.BytesIO, load: Callable[[tuple[Any, ...]], Storage]) -> Any:
    """Reads the pickle of what was saved; its tensors become `StoredTensor` of the file.

    Args:
      path: The file.
      stream: Begins with the pickle; is left behind its end.
      load: The storage behind a persistent id.

    Raises:
      RefusedFileError: The pickle is damaged or asks for what tensors do not need, a tensor reaches
        outside its storage, or tensors overlap without measure.
    """
    tensors: set[StoredTensor] = set()

    def rebuild(*lengths: int) -> Function:
        def call(arguments: tuple[Any, ...]) -> StoredTensor:
            result = _tensor(path, arguments, lengths)
            tensors.add(result)
            return result

        return Function(call)

    names = {
        **_NAMES,
        ("torch._utils", "_rebuild_tensor"): rebuild(4),  # until torch 0.3
        ("torch._utils", "_rebuild_tensor_v2"): rebuild(6, 7),
    }
    saved = interpret(stream, names, load)
    size = path.stat().st_size
    if sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors) > 2 * size:
        raise RefusedFileError("its tensors overlap: together they are over twice the file's size")
    return saved


def declared(identity: tuple[Any, ...]) -> tuple[np.dtype, str, int]:
    """Type, key and number of elements of a persistent id ('storage', type, key, location, numel).

    Raises:
      RefusedFileError: It is something else.
    """
    kinds = (str, np.dtype, str, str, int)
    if not all(map(isinstance, identity, kinds)) or identity[0] != "storage":
        raise RefusedFileError("a persistent id is not ('storage', type, key, location, size)")
    _, dtype, key, _, numel = identity[:5]
    if isinstance(numel, bool) or not 0 <= numel <= MAX_ELEMENTS:
        raise RefusedFileError(f"storage {short(key)} declares {short(numel)} elements of {dtype}")
    return dtype, key, numel


def _tensor(path: Path, arguments: tuple[Any, ...], lengths: tuple[int, ...]) -> StoredTensor:
    if len(arguments) not in lengths or not isinstance(arguments[0], Storage):
        raise RefusedFileError("a tensor is not (storage, offset, shape, strides, ...)")
    storage, offset, shape, strides = arguments[:4]
    numbers: list[Any] = [None]
    if type(shape) is tuple and type(strides) is tuple:
        numbers = [offset, *shape, *strides]
    if any(type(number) is not int for number in numbers) or len(shape) != len(strides):
        raise RefusedFileError("a tensor's offset, shape or strides are not whole numbers")
    if min(numbers) < 0 or max(numbers) > MAX_ELEMENTS or is_absurd(shape):
        raise RefusedFileError(
            f"a tensor has a negative or absurd offset {short(offset)}, shape {short(shape)} "
            f"or strides {short(strides)}"
        )
    if len(arguments) == 7 and arguments[6]:
        raise RefusedFileError("a tensor is a lazy conjugate or negative, which is not supported")
    # Without this an expanded tensor (stride 0) of a few bytes could ask for any amount of memory.
    if math.prod(shape) > storage.numel or offset + span(shape, strides) > storage.numel:
        raise RefusedFileError(
            f"a tensor of shape {short(shape)}, strides {short(strides)}, offset {short(offset)} "
            f"reaches outside its storage of {storage.numel} elements"
        )
    start = storage.offset + offset * storage.dtype.itemsize
    return StoredTensor(path, start, storage.dtype, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor):
        raise RefusedFileError("a parameter is not (tensor, requires_grad, hooks)")
    return arguments[0]


def _old_parameter(arguments: tuple[Any, ...], state: Any) -> StoredTensor:
    """A parameter as torch until 0.3 saved it: made of its tensor, or its state begins with it."""
    if type(state) is tuple and (len(arguments), len(state)) in ((1, 3), (0, 5)):
        tensor = (*arguments, *state)[0]
        if isinstance(tensor, StoredTensor):
            return tensor
    raise RefusedFileError("a parameter is not (tensor, requires_grad, hooks)")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict:
    """An OrderedDict; Python 2 saved its items as an argument, [[key, value], ...]."""
    items = arguments[0] if len(arguments) == 1 else []
    pairs = type(items) is list and all(type(i) in (list, tuple) and len(i) == 2 for i in items)
    if len(arguments) > 1 or not pairs:
        raise RefusedFileError("an OrderedDict is built from something other than its items")
    for key, _ in items:
        check_key(key)
    result = dict(items)
    items.clear()  # used once; a file could otherwise ask for the same long list again and again
    return result


def _size(arguments: tuple[Any, ...]) -> tuple:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise RefusedFileError("a torch.Size is not built from a tuple")
    return arguments[0]


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function(_ordered_dict),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch.nn.parameter", "Parameter"): Class(_old_parameter),
    ("torch", "Size"): Function(_size),
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
