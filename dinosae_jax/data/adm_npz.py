"""The .npz files of the ADM evaluation suite: batches of samples, and references with moments.

A batch holds `arr_0`, uint8 [n, h, w, 3]. A reference holds 10,000 images as `arr_0` and the
moments of the whole training set: `mu`, `sigma` (pool3, 2048) and `mu_s`, `sigma_s` (spatial,
2023). Images are read and written as a stream, because 50,000 of them are 9.8 GB. A
member `recipe`, which other programs ignore, says how the moments were made.

The files may come from strangers: members are arrays of numbers or text (never pickles), their
headers must tell their sizes, and a file unpacks to at most `MAX_EXPANSION` times its size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
from etils import epath
from numpy.lib import format as npy
from numpy.typing import NDArray

from dinosae_jax.runtime import files, untrusted

MAX_EXPANSION = 200
MAX_IMAGE_BYTES = 1 << 26
MAX_MEMBERS = 1000
Images = NDArray[np.uint8]  # [n, h, w, 3]


@dataclasses.dataclass(frozen=True)
class Archive:
    """Images of an .npz batch or reference, read on demand."""

    path: epath.Path
    shape: tuple[int, int, int, int]

    def batches(self, size: int) -> Iterator[Images]:
        """Yields uint8 [b, h, w, 3] in order, b = size but for the last batch.

        Raises:
          ValueError: the file is damaged, or ends before its images do.
        """
        with (
            as_one_line(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            _read_header(file)
            for start in range(0, self.shape[0], size):
                shape = (min(size, self.shape[0] - start), *self.shape[1:])
                data = file.read(int(np.prod(shape)))
                if len(data) != np.prod(shape):
                    raise ValueError(
                        f"an .npz holds as many images as its header says, {self.shape[0]}; got "
                        f"{self.path}, which ends after {start}; copy or write it again"
                    )
                yield np.frombuffer(data, np.uint8).reshape(shape)


def open_archive(path: epath.Path) -> Archive:
    """Opens the images of an .npz file and checks their layout; no image is read yet.

    Raises:
      ValueError: not an .npz file with `arr_0` as uint8 [n, h, w, 3] in C order, or a damaged one.
    """
    rule = "images come as an .npz with arr_0 as uint8 [n, h, w, 3] in C order"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{rule}; got {path}, no .npz; write it with adm_npz.write_images")
    with as_one_line(path), zipfile.ZipFile(path) as archive:
        _check_members(path, archive)
        if "arr_0.npy" not in archive.namelist():
            names = sorted(name.removesuffix(".npy") for name in archive.namelist())
            way = "name the images arr_0"
            if "mu" in names:
                way = "moments alone do not say which resize made them, so add the images"
            shown = untrusted.short(", ".join(names[:8]))
            raise ValueError(f"{rule}; got {path} with members {shown}; {way}")
        with archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _read_header(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        order = "Fortran" if fortran else "C"
        raise ValueError(
            f"{rule}; got {path} with {dtype} {list(shape)} in {order} order; convert it"
        )
    if not shape[0] or not 0 < math.prod(shape[1:]) <= MAX_IMAGE_BYTES:
        raise ValueError(
            f"{path} must hold images of 1 to {MAX_IMAGE_BYTES >> 20} Mi numbers; got "
            f"{list(shape)}; convert it"
        )
    return Archive(path, (shape[0], shape[1], shape[2], shape[3]))


def write_images(path: epath.Path, batches: Iterable[Images], count: int) -> None:
    """Writes exactly `count` images as an .npz batch, keeping one batch in memory.

    Args:
      path: the file to write; it appears under this name when it is complete.
      batches: uint8 [b, h, w, 3] each; images beyond `count`, of a padded last batch, are dropped.
      count: number of images.

    Raises:
      ValueError: batches of another layout, or fewer images than `count`.
    """
    with (
        files.publishing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        _write_batches(file, batches, count)


def _write_batches(file: IO[bytes], batches: Iterable[Images], count: int) -> None:
    shape: tuple[int, ...] | None = None
    written = 0
    for batch in batches:
        if (
            batch.dtype != np.uint8
            or batch.ndim != 4
            or batch.shape[1:] != (shape or batch.shape[1:])
        ):
            raise ValueError(
                "an .npz batch takes uint8 images [b, h, w, 3] of one size; "
                f"got {batch.dtype} {list(batch.shape)}; convert them with to_uint8"
            )
        if shape is None:
            shape = batch.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            npy.write_array_header_1_0(file, header)
        kept = batch[: count - written]
        file.write(np.ascontiguousarray(kept).tobytes())
        written += len(kept)
        if written == count:
            return
    raise ValueError(
        f"an .npz batch needs the {count} images that were asked for; got {written}; make more"
    )


@contextlib.contextmanager
def open_members(path: epath.Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens an .npz file whose members were checked: reading them takes what the file is worth.

    Raises:
      ValueError: the file is damaged, holds a pickle, or unpacks to far more than its size.
    """
    with as_one_line(path):
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays


def _check_members(path: epath.Path, archive: zipfile.ZipFile) -> None:
    """Raises ValueError where a member is no array, lies about its size, or is a bomb."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    limit = MAX_EXPANSION * files.size(path)
    names = {member.filename for member in members}
    if total > limit or len(members) > MAX_MEMBERS or len(names) < len(members):
        raise ValueError(
            f"{path} must hold at most {MAX_MEMBERS} members of {limit} bytes; got "
            f"{len(members)} of {total} bytes under {len(names)} names; write it again"
        )
    for member in members:
        with archive.open(member) as file:
            shape, _, dtype = _read_header(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != member.file_size or min(shape, default=0) < 0:
            got = "a pickle" if dtype.hasobject else f"{dtype} {list(shape)[:8]}"
            raise ValueError(
                f"{path}: members are arrays of numbers as large as their headers say; got "
                f"{untrusted.short(got)} in {member.file_size} bytes of "
                f"{untrusted.short(member.filename)}; write it again"
            )


@contextlib.contextmanager
def as_one_line(path: epath.Path) -> Iterator[None]:
    """Turns what zipfile raises for bytes that changed into a ValueError that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # zipfile seeks to places before a truncated file; other errors are no damage
        raise ValueError(
            f"an .npz must be whole; got {path}, which is damaged ({error}); copy or write it again"
        ) from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return reader(file)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"a member of an .npz file is an array; got {untrusted.short(error)}; write it again"
        ) from None
