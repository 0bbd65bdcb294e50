"""Paths that a user named, here or in a bucket, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from etils import epath

from dinosae_jax import rules
from dinosae_jax.runtime import buckets

HASHING_THREADS = 8


def path(text: str | os.PathLike) -> epath.Path:
    """The path that a user named: a place of this machine, `gs://...` or `s3://...`.

    Every path of the package is made here or derived from one that was. `~` is the home folder.

    Raises:
      ValueError: a URL of another scheme, or one whose package is not installed.
    """
    rules.check_url("a path", os.fspath(text))
    if buckets.is_bucket(text):
        buckets.set_up()
    return epath.Path(text).expanduser()


def caches() -> pathlib.Path:
    """For what this machine can make again: `dinosae_jax` in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "dinosae_jax"


def place(text: str) -> tuple[str, str]:
    """What `PATH` or `KIND:PATH` names, the same however the path is spelled; for comparisons."""
    kind, _, named = text.rpartition(":")
    return kind, os.path.realpath(os.path.expanduser(named)) if named else ""


def absolute(place: epath.Path) -> epath.Path:
    """A path that does not depend on the working directory, as Orbax needs it."""
    return epath.Path(place if buckets.is_bucket(place) else os.path.abspath(place))


def write_json(target: epath.Path, content: Any) -> None:
    """Writes indented JSON with sorted keys, whole or not at all.

    Args:
      target: the file; an existing file is replaced atomically.
      content: what `json.dumps` takes.
    """
    write_text(target, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(target: epath.Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(target, text.encode())


def write_bytes(target: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all: by a rename, or as one object."""
    if buckets.is_bucket(target):
        buckets.write(target, data)
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


@contextlib.contextmanager
def publishing(target: epath.Path) -> Iterator[pathlib.Path]:
    """A file of this machine to be written, which becomes `target` where the block ends well."""
    if buckets.is_bucket(target):
        with tempfile.TemporaryDirectory(prefix="dinosae_jax_") as place:
            partial = pathlib.Path(place) / target.name
            yield partial
            buckets.upload(partial, target)
        return
    partial = pathlib.Path(target.with_name(f".{target.name}"))
    yield partial
    os.replace(partial, target)


def publish_folder(folder: pathlib.Path, target: epath.Path, last: str = "") -> None:
    """Copies what lies in a folder of this machine to another, the file named `last` after all."""
    found = sorted(each for each in folder.rglob("*") if each.is_file())
    for each in sorted(found, key=lambda each: each.relative_to(folder).as_posix() == last):
        place = target / each.relative_to(folder).as_posix()
        if buckets.is_bucket(target):
            buckets.upload(each, place)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            with publishing(place) as partial:
                partial.write_bytes(each.read_bytes())


def names_in(folder: epath.Path) -> list[str]:
    """The names of what lies in a folder, none where there is no such folder."""
    if buckets.is_bucket(folder):
        return buckets.names_in(folder)
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders_in(folder: epath.Path) -> list[str]:
    """The names of the folders directly in a folder; OSError where that cannot be read."""
    if buckets.is_bucket(folder):
        return [name for name, size in buckets.contents(folder).items() if size is None]
    with os.scandir(folder) as found:
        return [entry.name for entry in found if entry.is_dir()]


def matching(pattern: str) -> list[str]:
    """The paths that a pattern with `*`, `?` or `[` names, sorted, or the file of that name."""
    if buckets.is_bucket(pattern):
        return buckets.matching(pattern)
    return [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))


def size(target: epath.Path) -> int:
    """Bytes of a file."""
    return buckets.size(target) if buckets.is_bucket(target) else os.path.getsize(target)


def modified(target: epath.Path) -> float:
    """When a file was written, in seconds since 1970 by the clock of where it is."""
    return buckets.modified(target) if buckets.is_bucket(target) else os.stat(target).st_mtime


def read_range(target: str, offset: int, length: int) -> bytes:
    """Some bytes of a file: of an object in one request."""
    if buckets.is_bucket(target):
        return buckets.read_range(target, offset, length)
    with open(target, "rb") as file:
        file.seek(offset)
        return file.read(length)


def file_sha256(target: epath.Path | pathlib.Path) -> str:
    """The sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with buckets.as_oserror(target), target.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_sha256s(targets: Sequence[epath.Path | pathlib.Path]) -> list[str]:
    """The sha256 of several files, read by `HASHING_THREADS`."""
    with futures.ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(file_sha256, targets))


@contextlib.contextmanager
def path_for_glob(folder: epath.Path) -> Iterator[epath.Path]:
    """A name of an existing folder without `*`, `?` and `[`, for libraries that search in it.

    Orbax lists what it has written with a pattern that begins with the path as it is: below a
    folder called `run[1]` it finds nothing, and commits a checkpoint that cannot be read.

    Raises:
      ValueError: a name in a bucket with one of these.
    """
    place = absolute(folder)
    odd = set("*?[") & set(str(place))
    if odd and buckets.is_bucket(folder):
        raise ValueError(
            f"a folder in a bucket has a name without * ? and [; got {folder}; use another"
        )
    if not odd:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="dinosae_jax_") as temporary:
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(place, target_is_directory=True)
        yield epath.Path(link)


def folder_sha256(folder: pathlib.Path, pattern: str) -> str:
    """A sha256 of the files under a folder that match a pattern: their places and contents."""
    found = sorted(each for each in folder.rglob(pattern) if each.is_file())
    lines = [f"{each.relative_to(folder).as_posix()} {file_sha256(each)}" for each in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
