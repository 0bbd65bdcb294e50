"""Small files: JSON that is written whole or not at all, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON with sorted keys, whole or not at all.

    Args:
      path: the file; an existing file is replaced atomically.
      content: what `json.dumps` takes.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: pathlib.Path) -> str:
    """The sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def path_for_glob(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name of an existing folder without `*`, `?` and `[`, for libraries that search in it.

    Orbax lists what it has written with a pattern that begins with the path as it is: below a
    folder called `run[1]` it finds nothing, and commits a checkpoint that cannot be read.
    """
    absolute = folder.absolute()
    if not set("*?[") & set(str(absolute)):
        yield absolute
        return
    with tempfile.TemporaryDirectory(prefix="dinosae_jax_") as place:
        link = pathlib.Path(place) / "folder"
        link.symlink_to(absolute, target_is_directory=True)
        yield link


def folder_sha256(folder: pathlib.Path, pattern: str) -> str:
    """A sha256 of the files under a folder that match a pattern: their places and contents."""
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
