"""Tells what a file is by its first bytes; its name says nothing."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion.readers.stored import RefusedFileError, short

HEAD_BYTES = 512
SAFETENSORS, TORCH, JSON = "safetensors", "torch", "json"

DOWNLOAD = "download it again, signed in where the licence asks for it"
SAVE_AGAIN = (
    "save it once more, with torch.save(torch.load(FILE, weights_only=True), OUT), or as "
    "safetensors"
)
UNPACK = "unpack it first"
# The pickle of 0x1950A86A20F9469CFC6C, with which torch.save began its files before torch 1.6.
LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# What people also have, by how it begins: (bytes, what it is, way out).
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "run git annex get"),
    (b"\x80", "a plain pickle, which could run anything", SAVE_AGAIN),
    (b"\x1f\x8b", "compressed by gzip", UNPACK),
    (b"BZh", "compressed by bzip2", UNPACK),
    (b"\xfd7zXZ\x00", "compressed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x89HDF", "an HDF5 file (Keras)", "take the torch or safetensors weights"),
    (b"GGUF", "a GGUF file", "take the torch or safetensors weights"),
    (b"\x93NUMPY", "a NumPy array", "take the torch or safetensors weights"),
)


def format_of(path: Path) -> str:
    """The format of a file: `SAFETENSORS`, `TORCH` (of today or from before 1.6) or `JSON`.

    Raises:
      RefusedFileError: It is anything else; the message calls it by its name.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PK\x03\x04") or is_legacy_torch(head):
        return TORCH
    if head[8:9] == b"{":
        return SAFETENSORS
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"{", b"[")):
        return JSON
    what, way_out = _other(head, text)
    raise RefusedFileError(
        f"{short(path.name)}: weights are a safetensors or a torch file; got {what}; {way_out}"
    )


def is_legacy_torch(head: bytes) -> bool:
    """Whether a file that begins so is of the format of torch before 1.6."""
    return head.startswith(b"\x80") and head[2:].startswith(LEGACY_TORCH)


def _other(head: bytes, text: bytes) -> tuple[str, str]:
    """What a file is that holds no weights for us, and what to do about it."""
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", text.lower()):
        return "a web page (HTML or XML), as sites send in place of a file", DOWNLOAD
    for start, what, way_out in OTHERS:
        if head.startswith(start):
            return what, way_out
    if head[257:262] == b"ustar":
        return "a tar archive (torch before 0.1.10 wrote such files)", f"{UNPACK}, or {SAVE_AGAIN}"
    if not head:
        return "an empty file", "download it again"
    if not head.strip(b"\0"):
        return "nothing but zeros, as an interrupted download leaves", "download it again"
    if len(head) < 9:
        return f"{len(head)} bytes", "download it again"
    return f"bytes that begin with {short(head[:12])}", "check --input, or download it again"
