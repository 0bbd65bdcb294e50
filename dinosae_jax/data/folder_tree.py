"""A folder of the file system, or of a bucket, as a tree of images; links are followed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from dinosae_jax.data.tree import (
    DANGLING,
    HIDDEN,
    NO_IMAGE,
    Contents,
    Image,
    LeftOut,
    Node,
    is_hidden,
    is_image,
    printable,
)
from dinosae_jax.runtime import buckets, files

LOOP = "links to a folder above them"


def open_folder(path: str | os.PathLike) -> Node:
    """Returns the tree of a folder.

    Reading it raises ValueError where a folder cannot be read, or where a link leads to nothing and
    is not named as images are: a whole class may be behind it.
    """
    found = files.path(path)
    return _object_node(str(found)) if buckets.is_bucket(found) else _node(str(found), frozenset())


def _node(path: str, above: frozenset[tuple[int, int]]) -> Node:
    return Node(printable(path), functools.partial(_read, path, above))


def _read(path: str, above: frozenset[tuple[int, int]]) -> Contents:
    images: dict[str, Image] = {}
    folders: dict[str, Node] = {}
    left_out = LeftOut()
    above |= {_identity(path)}
    for entry in _entries(path):
        name = entry.name
        if is_hidden(name):
            left_out.add(HIDDEN, _shown(entry))
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out.add(_dangling(entry), _shown(entry))
        elif entry.is_file() and is_image(name):
            images[name] = Image(entry.path)
        elif entry.is_dir():
            if entry.is_symlink() and _identity(entry.path) in above:
                left_out.add(LOOP, _shown(entry))
            else:
                folders[name] = _node(entry.path, above)
        else:
            left_out.add(NO_IMAGE, _shown(entry))
    return Contents(images, folders, left_out)


def _object_node(path: str) -> Node:
    return Node(printable(path), functools.partial(_read_bucket, path))


def _read_bucket(path: str) -> Contents:
    images: dict[str, Image] = {}
    folders: dict[str, Node] = {}
    left_out = LeftOut()
    for name, size in sorted(buckets.contents(path).items()):
        place, shown = f"{path}/{name}", printable(f"{path.rpartition('/')[2]}/{name}")
        if is_hidden(name):
            left_out.add(HIDDEN, shown)
        elif size is None:
            folders[name] = _object_node(place)
        elif is_image(name):
            images[name] = Image(place, 0, size)
        else:
            left_out.add(NO_IMAGE, shown)
    return Contents(images, folders, left_out)


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(path, error) from error
    yield from entries


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.st_dev, found.st_ino


def _dangling(entry: os.DirEntry[str]) -> str:
    """Why a link to nothing is left out, where it is one of an image."""
    if is_image(entry.name):
        return DANGLING
    raise ValueError(
        f"a link in an image folder leads somewhere; got {printable(entry.path)} -> "
        f"{printable(os.readlink(entry.path))}, which cannot be reached; restore that, or remove "
        "the link"
    )


def _shown(entry: os.DirEntry[str]) -> str:
    return printable(os.path.join(os.path.basename(os.path.dirname(entry.path)), entry.name))


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"an image folder must be readable; got {printable(path)} ({error.strerror}); check the "
        "path and its permissions"
    )
