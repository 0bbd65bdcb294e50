"""Reads records and names that somebody else may have written, so that they can do no harm.

A record is JSON of at most `MAX_JSON_BYTES`, an object at the top. In memory JSON takes at most
some thirty times its size, so that no record costs more than half a gigabyte. A name in a record
stands for a file of the record's own folder, never for one elsewhere.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
from etils import epath

from dinosae_jax import spelling
from dinosae_jax.runtime import buckets, files

MAX_JSON_BYTES = 1 << 24


def short(text: object, limit: int = 80) -> str:
    """Makes text from a file safe to print in one line: printable characters, at most `limit`."""
    line = spelling.printable(str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def dtype(name: object) -> np.dtype[Any]:
    """The data type that a record calls `name`, such as "bfloat16".

    numpy reads longer texts too, as structures whose sizes it evaluates.

    Raises:
      ValueError: no name of a data type.
    """
    try:
        if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
            return np.dtype(name)
    except TypeError:
        pass
    raise ValueError(f"a data type has a name such as float32; got {short(repr(name))}")


def read_json(path: epath.Path, way_out: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      way_out: what the message tells the reader to do, such as "convert the weights again".

    Raises:
      ValueError: one line, where the file is missing, too large, or no JSON object.
    """
    try:
        size = files.size(path)
        text = path.read_bytes() if size <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise ValueError(
            f"{short(path.name)} must be readable; got {error.strerror or error} at "
            f"{short(path, 300)}; {way_out}"
        ) from None
    try:
        content = json.loads(text) if size <= MAX_JSON_BYTES else f"{size} bytes"
    except (ValueError, RecursionError) as error:
        content = short(f"{type(error).__name__}: {error}")
    if isinstance(content, dict):
        return content
    got = content if isinstance(content, str) else f"a {type(content).__name__}"
    raise ValueError(
        f"{short(path, 300)} must be a JSON object of at most {MAX_JSON_BYTES >> 20} MiB; "
        f"got {short(got)}; {way_out}"
    )


def inside(folder: epath.Path, name: object, way_out: str) -> epath.Path:
    """The file that a record calls `name`, which must lie in the record's own folder.

    Args:
      folder: where the record lies; the folder itself may be reached by a symbolic link.
      name: from the record; one plain name, without a path.
      way_out: what the message tells the reader to do.

    Raises:
      ValueError: one line, where the name is no plain name, or is a link that leaves the folder.
    """
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 255
    if not plain or not name or name in (".", "..") or {"/", "\\", ":"} & set(str(name)):
        raise ValueError(
            f"a record in {short(folder, 300)} may only name files of its own folder; got "
            f"{short(repr(name))}; {way_out}"
        )
    path = folder / str(name)
    check_inside(folder, path, way_out)
    return path


def check_inside(folder: epath.Path, path: epath.Path, way_out: str) -> None:
    """Raises ValueError where a path, its symbolic links followed, leaves a folder.

    In a bucket there are no links.
    """
    if buckets.is_bucket(folder):
        return
    try:
        stays = pathlib.Path(path).resolve().is_relative_to(pathlib.Path(folder).resolve())
    except (OSError, RuntimeError):  # a link to itself
        stays = False
    if not stays:
        raise ValueError(
            f"everything in {short(folder, 300)} must lie in it; got {short(path.name)}, a link to "
            f"elsewhere; {way_out}"
        )


def check_tree_inside(folder: epath.Path, way_out: str) -> int:
    """Raises ValueError where anything below a folder is a link out of it; returns its bytes."""
    total = 0
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_symlink():
            check_inside(folder, epath.Path(path), way_out)
        if path.is_file():
            total += path.stat().st_size
    return total
