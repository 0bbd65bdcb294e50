"""Copies on this machine of what is read from buckets by libraries that only read files.

A copy is named after what the bucket held when it was made: the names and versions of its objects.
It is complete or not there at all, of several processes one makes it, and an interrupted copy goes
on where it was. All copies together take at most `limit()` bytes: the ones that were not used
for longest are removed first, never one that a process uses now. What does not fit is refused.

The copies are in the folder `DINOSAE_CACHE`, by default `buckets` in `files.caches()`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import IO

from etils import epath

from dinosae_jax.runtime import buckets, console, files, untrusted

FOLDER = "DINOSAE_CACHE"
GIBIBYTES = "DINOSAE_CACHE_GIB"
SHARE = 0.8  # of the space that is free, where GIBIBYTES is not set
THREADS = 16
ANNOUNCED = 1 << 28  # bytes from which a copy is announced


def local(path: epath.Path, names: Iterable[str] | None = None) -> epath.Path:
    """A place on this machine with the contents of a path: itself, or a copy of what a bucket has.

    Args:
      path: a file or a folder.
      names: which files of the folder are copied, by their paths below it; None for all.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is larger than the limit.
    """
    if not buckets.is_bucket(path):
        return path
    objects = buckets.listing(path)
    if names is not None:
        objects = {name: objects[name] for name in names if name in objects}
    if not objects:
        raise FileNotFoundError(str(path))
    odd = next((name for name in objects if {"..", "."} & set(name.split("/"))), None)
    if odd is not None:  # on a disk it would lead out of the folder
        raise ValueError(
            f"objects that are copied lie below their folder; got {untrusted.short(odd)} in {path}"
            "; rename it"
        )
    digest = hashlib.sha256(repr((str(path), sorted(objects.items()))).encode()).hexdigest()[:32]
    copy = root() / digest
    copy.parent.mkdir(parents=True, exist_ok=True)
    _use(copy)
    with _held(copy.with_name(f"{copy.name}.copying")):  # of several processes one copies
        if not copy.exists():
            _copy(path, objects, copy)
    os.utime(copy)
    return epath.Path(copy / path.name)


def root() -> pathlib.Path:
    """The folder of the copies."""
    named = os.environ.get(FOLDER)
    return pathlib.Path(named).expanduser() if named else files.caches() / "buckets"


def limit() -> int:
    """How many bytes all copies together may take."""
    given = os.environ.get(GIBIBYTES)
    if given:
        return int(float(given) * 2**30)
    return int(SHARE * (shutil.disk_usage(root()).free + _taken()))


def _copy(path: epath.Path, objects: dict[str, buckets.Object], copy: pathlib.Path) -> None:
    total = sum(each.size for each in objects.values())
    _make_room(total, path)
    partial = copy.with_name(f"{copy.name}.partial")
    began = time.monotonic()

    def fetch(name: str) -> None:
        target = partial / path.name / name if name else partial / path.name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        incoming = target.with_name(f".{target.name}.incoming")
        buckets.download(path / name if name else path, incoming)
        if incoming.stat().st_size != objects[name].size:
            raise OSError(f"{path / name} changed while it was copied; run the same command again")
        os.replace(incoming, target)

    if total >= ANNOUNCED:
        console.report(f"Copies {path} ({total / 2**30:.1f} GiB) to {copy}")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, sorted(objects)))
    partial.rename(copy)
    if total >= ANNOUNCED:
        rate = total / 1e6 / max(time.monotonic() - began, 1e-9)
        console.report(f"Copied {path} at {rate:,.0f} MB/s")


def _make_room(wanted: int, path: epath.Path) -> None:
    """Removes the copies that were not used for longest, until `wanted` bytes fit."""
    most = limit()
    if wanted > most:
        raise ValueError(
            f"what is read from a bucket is copied to {root()}, {most / 2**30:.1f} GiB at most; "
            f"got {wanted / 2**30:.1f} GiB of {path}; set {GIBIBYTES} higher, {FOLDER} to a larger "
            "disk, or mount the bucket and name the folder where it is mounted"
        )
    copies = [each for each in root().iterdir() if each.is_dir()]
    for old in sorted(copies, key=lambda each: each.stat().st_mtime):
        if _taken() + wanted <= most:
            return
        with _lock_of(old).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # in use
            shutil.rmtree(old, ignore_errors=True)


@functools.cache
def _use(copy: pathlib.Path) -> IO[bytes]:
    """Keeps a copy from being removed while this process lives."""
    lock = _lock_of(copy).open("ab")
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_of(copy: pathlib.Path) -> pathlib.Path:
    return copy.with_name(f"{copy.name.removesuffix('.partial')}.lock")


def _taken() -> int:
    """Bytes of all copies."""
    return sum(each.stat().st_size for each in root().rglob("*") if each.is_file())
