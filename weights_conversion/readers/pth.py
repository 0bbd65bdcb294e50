"""Reads torch's zip format (.pth, .pt, .bin) without torch and without running anything.

The file is a zip archive of one folder: `data.pkl`, a pickle whose tensors refer by key to raw
storages in `data/KEY`, and (since torch 2.1) `byteorder`. Members are stored, never compressed, so
each tensor is a window of the file: nothing is unpacked, and a tensor is read when it is asked for.
Everything that a well-formed file does not need is refused with one line.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from weights_conversion.readers.pickle_machine import Function, interpret
from weights_conversion.readers.stored import (
    MAX_ELEMENTS,
    RefusedFileError,
    StoredTensor,
    is_absurd,
    short,
    span,
)

MAX_MEMBERS = 65_535
SAVE_AGAIN = "download it again, or save the state dict alone as safetensors"
MAX_PICKLE_BYTES = 1 << 24
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

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
class _Member:
    offset: int
    size: int
    crc: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    offset: int
    numel: int


def read_pth(path: str | Path) -> Any:
    """Reads a torch zip file into plain containers whose tensors are `StoredTensor`.

    Args:
      path: A file written by torch.save since 1.6.

    Returns:
      What was saved: dicts (also for OrderedDict), lists, tuples, numbers, strings, tensors.

    Raises:
      RefusedFileError: One line that says what is wrong; nothing of the file has been executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except RefusedFileError as error:
        raise RefusedFileError(
            f"{short(path.name)}: a torch file is a whole zip archive of tensors, as torch.save "
            f"writes it; got a file of which {error}; {SAVE_AGAIN}"
        ) from None


def _read(path: Path, file: BinaryIO) -> Any:
    members = _torch_members(file)
    if "byteorder" in members:
        order = _content(file, "byteorder", members["byteorder"], 16)
        if order != b"little":
            raise RefusedFileError(f"the byte order is {short(order)}, not little")
    pickle = _content(file, "data.pkl", members["data.pkl"], MAX_PICKLE_BYTES)
    storages: dict[str, _Storage] = {}
    tensors: set[StoredTensor] = set()

    def load(identity: tuple[Any, ...]) -> _Storage:
        key, storage = _storage(identity, members)
        if storages.setdefault(key, storage) != storage:
            raise RefusedFileError(f"storage {short(key)} is used with two types or sizes")
        return storage

    def tensor(arguments: tuple[Any, ...]) -> StoredTensor:
        result = _tensor(path, arguments)
        tensors.add(result)
        return result

    names = dict(_NAMES)
    names["torch._utils", "_rebuild_tensor_v2"] = Function(tensor)
    saved = interpret(pickle, names, load)
    size = path.stat().st_size
    if sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors) > 2 * size:
        raise RefusedFileError("its tensors overlap: together they are over twice the file's size")
    for key in storages:
        _check_crc(file, f"data/{key}", members[f"data/{key}"])
    return saved


def _storage(identity: tuple[Any, ...], members: dict[str, _Member]) -> tuple[str, _Storage]:
    kinds = (str, np.dtype, str, str, int)
    if len(identity) != 5 or not all(map(isinstance, identity, kinds)) or identity[0] != "storage":
        raise RefusedFileError("a persistent id is not ('storage', type, key, location, size)")
    _, dtype, key, _, numel = identity
    member = members.get(f"data/{key}")
    if member is None:
        raise RefusedFileError(f"storage {short(key)} is missing")
    if isinstance(numel, bool) or numel < 0 or numel * dtype.itemsize != member.size:
        raise RefusedFileError(
            f"storage {short(key)} declares {short(numel)} elements of {dtype}, "
            f"but has {member.size} bytes"
        )
    return key, _Storage(dtype, member.offset, numel)


def _tensor(path: Path, arguments: tuple[Any, ...]) -> StoredTensor:
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
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


def _ordered_dict(arguments: tuple[Any, ...]) -> dict:
    if arguments:
        raise RefusedFileError("an OrderedDict is built from something other than its items")
    return {}


def _size(arguments: tuple[Any, ...]) -> tuple:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise RefusedFileError("a torch.Size is not built from a tuple")
    return arguments[0]


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function(_ordered_dict),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch", "Size"): Function(_size),
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


def _torch_members(file: BinaryIO) -> dict[str, _Member]:
    """The archive's members by their path below its single folder."""
    members = _zip_members(file)
    roots = {name.split("/", 1)[0] for name in members}
    if len(roots) != 1:
        raise RefusedFileError("it is a zip archive, but not of torch: it has not one folder")
    below = {name.split("/", 1)[-1]: member for name, member in members.items()}
    if "data.pkl" not in below or len(below) != len(members):
        raise RefusedFileError("the zip archive is not of torch: data.pkl is missing")
    return below


def _zip_members(file: BinaryIO) -> dict[str, _Member]:
    """Reads the central directory and checks it against the local headers.

    Stricter than the zip format: no compression, no encryption, no gap before the end record, no
    name twice, and no two members that share a byte.
    """
    size = file.seek(0, 2)
    if _at(file, 0, 4) != b"PK\x03\x04":
        raise RefusedFileError(
            "the first bytes are not a torch zip file, as with torch before 1.6 (plain pickle, tar)"
        )
    start, length, count = _directory(file, size)
    directory = _at(file, start, length)
    members: dict[str, _Member] = {}
    taken: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        name, member, header, position = _central_entry(directory, position)
        if name in members:
            raise RefusedFileError(f"member {short(name)} is there twice")
        member = _locate(file, name, member, header)
        if member.offset + member.size > start:
            raise RefusedFileError(f"member {short(name)} reaches outside the file")
        members[name] = member
        taken.append((header, member.offset + member.size))
    if position != length:
        raise RefusedFileError("the zip directory has bytes that belong to no member")
    taken.sort()
    for (_, end), (begin, _) in itertools.pairwise(taken):
        if begin < end:
            raise RefusedFileError("members of the zip archive overlap")
    return members


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start, length in bytes and entries of the central directory."""
    end = size - _END.size
    tag, disk, disk2, here, count, length, start, comment = _unpack(_END, _at(file, end, _END.size))
    if tag != b"PK\x05\x06" or comment or disk or disk2 or here != count:
        raise RefusedFileError("the zip archive is truncated or damaged: no end record at its end")
    if 0xFFFF in (count, here) or 0xFFFFFFFF in (length, start) or _has_locator(file, end):
        end -= _END64_LOCATOR.size
        tag, _, end64, _ = _unpack(_END64_LOCATOR, _at(file, end, _END64_LOCATOR.size))
        record = _unpack(_END64, _at(file, end64, _END64.size))
        if tag != b"PK\x06\x07" or record[0] != b"PK\x06\x06" or end64 + _END64.size != end:
            raise RefusedFileError("the zip64 end record is damaged")
        *_, here, count, length, start = record
        end = end64
    if here != count or count > MAX_MEMBERS or count * _CENTRAL.size > length:
        raise RefusedFileError(f"the zip directory declares {count} members in {length} bytes")
    if start + length != end:
        raise RefusedFileError("the zip directory does not end where the end record begins")
    return start, length, count


def _has_locator(file: BinaryIO, end: int) -> bool:
    offset = end - _END64_LOCATOR.size
    return offset >= 0 and _at(file, offset, 4) == b"PK\x06\x07"


def _central_entry(directory: bytes, position: int) -> tuple[str, _Member, int, int]:
    """Name, member (its data not located yet), local header's offset, next entry's position."""
    fields = _unpack(_CENTRAL, directory[position : position + _CENTRAL.size])
    tag, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment = fields[:13]
    header = fields[16]
    position += _CENTRAL.size
    raw = directory[position : position + n_name]
    extra = directory[position + n_name : position + n_name + n_extra]
    position += n_name + n_extra + n_comment
    if tag != b"PK\x01\x02" or position > len(directory):
        raise RefusedFileError("the zip directory is damaged")
    name = _safe_name(raw)
    wide = _zip64_numbers(extra)
    limit = 0xFFFFFFFF
    size = next(wide, -1) if size == limit else size
    packed = next(wide, -1) if packed == limit else packed
    header = next(wide, -1) if header == limit else header
    if method != 0 or size != packed or size < 0 or header < 0:
        raise RefusedFileError(f"member {short(name)} is compressed, which torch never does")
    if flags & 0x2041:
        raise RefusedFileError(f"member {short(name)} is encrypted")
    return name, _Member(0, size, crc), header, position


def _zip64_numbers(extra: bytes):
    """The 64-bit numbers of an entry's extra field 1, in the order of the 32-bit ones."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if kind == 1:
            return iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        position += 4 + length
    return iter(())


def _safe_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedFileError("a member's name is not UTF-8") from None
    parts = name.split("/")
    leaves = {"", ".", ".."} & set(parts) or "\\" in name or parts[0][1:2] == ":"
    if leaves or not name.isprintable():
        raise RefusedFileError(f"member {short(name)} has a path that leaves the archive's folder")
    return name


def _locate(file: BinaryIO, name: str, member: _Member, header: int) -> _Member:
    """Finds the member's data behind its local header, which must tell the same."""
    fields = _unpack(_LOCAL, _at(file, header, _LOCAL.size))
    n_name, n_extra = fields[9:11]
    raw = _at(file, header + _LOCAL.size, n_name)
    if fields[0] != b"PK\x03\x04" or raw != name.encode() or fields[3] != 0:
        raise RefusedFileError(f"the local header of member {short(name)} disagrees")
    return _Member(header + _LOCAL.size + n_name + n_extra, member.size, member.crc)


def _content(file: BinaryIO, name: str, member: _Member, limit: int) -> bytes:
    if member.size > limit:
        raise RefusedFileError(f"member {name} has {member.size} bytes, over the limit of {limit}")
    _check_crc(file, name, member)
    return _at(file, member.offset, member.size)


def _check_crc(file: BinaryIO, name: str, member: _Member) -> None:
    crc, left = 0, member.size
    _at(file, member.offset, 0)
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            raise RefusedFileError("the file is truncated")
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    if crc != member.crc:
        raise RefusedFileError(f"member {short(name)} is damaged: its checksum does not match")


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    if offset < 0 or offset + length > file.seek(0, 2):
        raise RefusedFileError("the file is truncated")
    file.seek(offset)
    return file.read(length)


def _unpack(layout: struct.Struct, data: bytes) -> tuple:
    if len(data) != layout.size:
        raise RefusedFileError("the zip directory is damaged")
    return layout.unpack(data)
