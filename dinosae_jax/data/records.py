"""Encoded images by index: of files, tar files, tensorflow-datasets and our own archives.

Each kind is an object with `len`, `read(index) -> (bytes of the image file, label)`,
`name(index)` for messages, `label_names`, `unlabelled`, and `fingerprint`, a hash of what the set
is made of. Where labels are not known they are -1, and `unlabelled` says why. Reading is random
access and safe from several threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from dinosae_jax.data.pixels import AS_THEY_ARE
from dinosae_jax.runtime import buckets, files

LARGEST_BAD_PART = 0.01  # of the images may be unreadable, then reading stops


class Records(Protocol):
    """Encoded images with labels, by index."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes' names in the order of the labels."""

    @property
    def fingerprint(self) -> str:
        """A hash of what the set is made of."""

    @property
    def unlabelled(self) -> str:
        """Why the labels are not known; empty where they are."""

    @property
    def pixels(self) -> Mapping[str, Any]:
        """What was done to the images before they were stored, a record of `pixels`."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The image file's bytes and its label; OSError where they cannot be read."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


def fingerprint_of(parts: Iterable[object]) -> str:
    """Sha256 (16 hexadecimal digits) over the parts' text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """Images that are files, or byte ranges of tar files (offset and size in bytes)."""

    names: list[str]
    files: list[str]  # the files that hold the images: one each, or the tars
    file_of: np.ndarray  # int32, the position in `files`
    offsets: np.ndarray  # int64
    sizes: np.ndarray  # int64
    labels: np.ndarray  # int32
    label_names: tuple[str, ...]
    fingerprint: str
    unlabelled: str = ""
    pixels: Mapping[str, Any] = dataclasses.field(default_factory=lambda: AS_THEY_ARE)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[bytes, int]:
        place = (int(self.offsets[index]), int(self.sizes[index]))
        file = self.files[self.file_of[index]]
        try:
            return files.read_range(file, *place), int(self.labels[index])
        except OSError as error:
            if isinstance(error, FileNotFoundError) or not buckets.is_bucket(file):
                raise
            # No damage: a run that passed over the image would not be the same again.
            raise ValueError(
                f"the bucket of the images must answer; got {error}; run the same command again"
            ) from error

    def name(self, index: int) -> str:
        return self.names[index]


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """A split of a prepared tensorflow-datasets set with the features image and label."""

    source: Any
    label_names: tuple[str, ...]
    fingerprint: str
    title: str
    unlabelled: str = ""
    pixels: Mapping[str, Any] = dataclasses.field(default_factory=lambda: AS_THEY_ARE)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        example = self.source[index]
        return example["image"], int(example["label"])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


@dataclasses.dataclass(frozen=True)
class ArchiveRecords:
    """The ArrayRecord shards that `dinosae_jax.data.archive` writes."""

    source: Any
    label_names: tuple[str, ...]
    fingerprint: str
    title: str
    unlabelled: str
    pixels: Mapping[str, Any]
    numbers: np.ndarray | None  # int64, training's number of each label of the shards

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        label, _, encoded = unpack_record(self.source[index])
        return encoded, -1 if self.numbers is None else int(self.numbers[label])

    def name(self, index: int) -> str:
        return f"{self.title}:{unpack_record(self.source[index])[1]}"


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the images of another set, by their indices int64 [n]."""

    parent: Records
    indices: np.ndarray
    fingerprint: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of the whole set."""
        return self.parent.label_names

    @property
    def unlabelled(self) -> str:
        """As in the whole set."""
        return self.parent.unlabelled

    @property
    def pixels(self) -> Mapping[str, Any]:
        """As in the whole set."""
        return self.parent.pixels

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.parent.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.parent.name(int(self.indices[index]))


def pack_record(label: int, name: str, encoded: bytes) -> bytes:
    """Returns an archive record: int32 label, uint32 length of the name, name, image file."""
    name_bytes = name.encode()
    return struct.pack("<iI", label, len(name_bytes)) + name_bytes + encoded


def unpack_record(record: bytes) -> tuple[int, str, bytes]:
    """Returns label, name and image bytes of an archive record."""
    label, length = struct.unpack_from("<iI", record)
    return label, record[8 : 8 + length].decode(), record[8 + length :]
