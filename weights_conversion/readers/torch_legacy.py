"""Reads the format that torch.save wrote before torch 1.6, without running anything.

Five pickles follow one another: a magic number, the version of the protocol, what the system was
like, what was saved, and the list of storage keys. Behind them lies each storage in the order of
that list: its number of elements as int64, then the elements. Both are little-endian on every
system. A storage has no offset of its own in the file, so what was saved is read twice: once to
learn the type and size of each storage, once with their places known.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from weights_conversion.readers.pickle_machine import interpret
from weights_conversion.readers.saved_tensors import MAX_PICKLE_BYTES, Storage, declared, unpickle
from weights_conversion.readers.stored import RefusedFileError, short

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
_COUNT = struct.Struct("<q")


def read_legacy(path: Path, file: BinaryIO) -> Any:
    """Reads a file that torch.save has written before 1.6; see `pth.read_pth`."""
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, version, system = (_plain(stream) for _ in range(3))
    if type(magic) is not int or magic != MAGIC:
        raise RefusedFileError("the magic number is not that of torch")
    if type(version) is not int or version != VERSION or type(system) is not dict:
        raise RefusedFileError(f"the version of the protocol is {short(version)}, not {VERSION}")
    start = stream.tell()
    sizes: dict[str, tuple[np.dtype, int]] = {}

    def note(identity: tuple[Any, ...]) -> Storage:
        key, whole, view = _storage(identity, None)
        if sizes.setdefault(key, (whole.dtype, whole.numel)) != (whole.dtype, whole.numel):
            raise RefusedFileError(f"storage {short(key)} is used with two types or sizes")
        return view

    unpickle(path, stream, note)
    offsets = _offsets(file, _plain(stream), stream.tell(), sizes)
    stream.seek(start)
    return unpickle(path, stream, lambda identity: _storage(identity, offsets)[2])


def _plain(stream: io.BytesIO) -> Any:
    """The next pickle, of numbers, strings and containers alone."""

    def load(_: Any) -> Any:
        raise RefusedFileError("a persistent id is where no tensor belongs")

    return interpret(stream, {}, load)


def _storage(
    identity: tuple[Any, ...], offsets: dict[str, int] | None
) -> tuple[str, Storage, Storage]:
    """Key of the storage, the storage, and the part of it that the tensors see."""
    if len(identity) != 6:
        raise RefusedFileError(
            "a persistent id is not ('storage', type, key, location, size, view), as where a "
            "module was saved in place of its state dict"
        )
    dtype, key, numel = declared(identity)
    whole = Storage(dtype, offsets[key] if offsets else 0, numel)
    view = identity[5]
    if view is None:
        return key, whole, whole
    if type(view) is not tuple or [type(part) for part in view] != [str, int, int]:
        raise RefusedFileError("a view of a storage is not (key, offset, size)")
    _, first, count = view
    if first < 0 or count < 0 or first + count > numel:
        raise RefusedFileError(
            f"a view of {short(count)} elements from {short(first)} reaches outside its storage "
            f"of {numel} elements"
        )
    return key, whole, Storage(dtype, whole.offset + first * dtype.itemsize, count)


def _offsets(
    file: BinaryIO, keys: Any, position: int, sizes: dict[str, tuple[np.dtype, int]]
) -> dict[str, int]:
    """Where each storage begins, checked against the counts in the file and against its end."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise RefusedFileError("the list of storages is not a list of keys")
    if len(set(keys)) != len(keys) or set(keys) != set(sizes):
        raise RefusedFileError(
            f"the list of {len(keys)} storages does not agree with the {len(sizes)} that its "
            "tensors use"
        )
    end = file.seek(0, 2)
    offsets = {}
    for key in keys:
        dtype, numel = sizes[key]
        file.seek(position)
        count = file.read(_COUNT.size)
        if len(count) == _COUNT.size and _COUNT.unpack(count)[0] != numel:
            raise RefusedFileError(
                f"storage {short(key)} declares {numel} elements of {dtype}, but has "
                f"{_COUNT.unpack(count)[0]}"
            )
        offsets[key] = position + _COUNT.size
        position = offsets[key] + numel * dtype.itemsize
        if position > end:
            raise RefusedFileError("the file is truncated")
    if position != end:
        raise RefusedFileError(f"{end - position} bytes follow the last storage")
    return offsets
