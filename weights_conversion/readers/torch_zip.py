"""Reads torch's zip format (.pth, .pt, .bin) without torch and without running anything.

The file is a zip archive of one folder: `data.pkl`, a pickle whose tensors refer by key to raw
storages in `data/KEY`, and (since torch 2.1) `byteorder`. Members are stored, never compressed, so
each tensor is a window of the file: nothing is unpacked, and a tensor is read when it is asked for.
Everything that a well-formed file does not need is refused with one line.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from weights_conversion.readers.saved_tensors import MAX_PICKLE_BYTES, Storage, declared, unpickle
from weights_conversion.readers.stored import RefusedFileError, short

MAX_MEMBERS = 65_535
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclasses.dataclass(frozen=True)
class _Member:
    offset: int
    size: int
    crc: int


def read_zip(path: Path, file: BinaryIO) -> Any:
    """Reads a file that torch.save has written since 1.6; see `pth.read_pth`."""
    members = _torch_members(file)
    if "byteorder" in members:
        order = _content(file, "byteorder", members["byteorder"], 16)
        if order != b"little":
            raise RefusedFileError(f"the byte order is {short(order)}, not little")
    pickle = io.BytesIO(_content(file, "data.pkl", members["data.pkl"], MAX_PICKLE_BYTES))
    storages: dict[str, Storage] = {}

    def load(identity: tuple[Any, ...]) -> Storage:
        key, storage = _storage(identity, members)
        if storages.setdefault(key, storage) != storage:
            raise RefusedFileError(f"storage {short(key)} is used with two types or sizes")
        return storage

    saved = unpickle(path, pickle, load)
    if pickle.read(1):
        raise RefusedFileError("the pickle ends with values or bytes left over")
    for key in storages:
        _check_crc(file, f"data/{key}", members[f"data/{key}"])
    return saved


def _storage(identity: tuple[Any, ...], members: dict[str, _Member]) -> tuple[str, Storage]:
    if len(identity) != 5:
        raise RefusedFileError("a persistent id is not ('storage', type, key, location, size)")
    dtype, key, numel = declared(identity)
    member = members.get(f"data/{key}")
    if member is None:
        raise RefusedFileError(f"storage {short(key)} is missing")
    if numel * dtype.itemsize != member.size:
        raise RefusedFileError(
            f"storage {short(key)} declares {short(numel)} elements of {dtype}, "
            f"but has {member.size} bytes"
        )
    return key, Storage(dtype, member.offset, numel)


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
        raise RefusedFileError("the first bytes are of neither format that torch.save writes")
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
