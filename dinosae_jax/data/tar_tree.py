"""Uncompressed tar files as one tree of images, which are read at their offsets.

ImageNet's training set is published as a tar of tars: a tar inside is a folder of its name.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from dinosae_jax.data.tree import (
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
from dinosae_jax.runtime import files

LINK = "links or sparse files in a tar"
TWICE = "replaced by a later member of that name"


@dataclasses.dataclass
class _Folder:
    images: dict[str, Image] = dataclasses.field(default_factory=dict)
    folders: dict[str, _Folder] = dataclasses.field(default_factory=dict)
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)

    def at(self, path: Sequence[str]) -> _Folder:
        """The folder at a path below, which is made where there is none."""
        return self.folders.setdefault(path[0], _Folder()).at(path[1:]) if path else self

    def node(self, place: str) -> Node:
        folders = {
            name: folder.node(f"{place}/{name}") for name, folder in sorted(self.folders.items())
        }
        return Node(place, lambda: Contents(self.images, folders, self.left_out))


def open_tars(paths: Sequence[str], shared_name: str = "") -> Node:
    """Returns the tree of some tar files.

    Args:
      paths: of the tars. Of several, the images that lie in no folder are of the class that the
        tar's name says.
      shared_name: the beginning of the tars' names that is no part of a class, as in
        train_n01440764.tar.

    Raises:
      ValueError: a file is no uncompressed tar, or it is cut short or damaged.
    """
    root = _Folder()
    for number, path in enumerate(paths):
        own_name = _stem(path)
        if len(paths) > 1:
            own_name = own_name.removeprefix(shared_name).lstrip("_-.") or own_name
        for member in _members(path):
            top = [own_name] if len(paths) > 1 and len(member.path) == 1 else member.path[:-1]
            _add(root, top, member, number, path)
    return root.node(paths[0] if len(paths) == 1 else f"{paths[0]}, ...")


@dataclasses.dataclass(frozen=True)
class _Member:
    path: list[str]  # folders and file name, without '.' and '..'
    name: str  # as the tar has it
    offset: int
    size: int
    is_plain: bool


def _add(root: _Folder, top: Sequence[str], member: _Member, number: int, path: str) -> None:
    hidden = next((place for place, name in enumerate(top) if is_hidden(name)), None)
    folder, name = root.at(top[:hidden]), member.path[-1]
    shown = printable(member.name)
    if hidden is not None or is_hidden(name):
        folder.left_out.add(HIDDEN, shown)
    elif not is_image(name):
        folder.left_out.add(NO_IMAGE, shown)
    elif not member.is_plain:
        folder.left_out.add(LINK, shown)
    else:
        if name in folder.images:
            folder.left_out.add(TWICE, shown)
        shown = f"{printable(os.path.basename(path))}/{shown}"
        key = (number, member.name)
        folder.images[name] = Image(path, member.offset, member.size, key, shown)


def _members(path: str) -> Iterator[_Member]:
    """The files of a tar and of the tars in it, in their order."""
    try:
        with files.path(path).open("rb") as file:
            yield from _members_of(file, [], "", 0)
    except (OSError, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            "a tar source is a whole, uncompressed tar file, which alone allows random access; got "
            f"{printable(path)} ({reason}); copy it again, or pack it again without compression"
        ) from error


def _members_of(file: IO[Any], folder: list[str], title: str, start: int) -> Iterator[_Member]:
    """The files of a tar whose first byte is at `start` of the outermost one."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = [each for each in posixpath.normpath(member.name).split("/") if each]
            path = [*folder, *(each for each in path if each not in (".", ".."))]
            if member.isdir() or not path:
                continue
            name, is_plain = title + member.name, member.isreg() and not member.issparse()
            inner = tar.extractfile(member) if is_plain and path[-1].endswith(".tar") else None
            if inner is None or is_hidden(path[-1]):
                yield _Member(path, name, start + member.offset_data, member.size, is_plain)
            else:
                inside = [*path[:-1], _stem(path[-1])]
                yield from _members_of(inner, inside, f"{name}/", start + member.offset_data)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"{title or 'the file'} is damaged or ends too early")


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".tar")
