"""Which images a folder or a set of tar files holds, of which split and class: one rule for both.

1. A root that holds one folder alone is a wrapper where that folder holds `train`, or several
   folders and no images: what is inside counts as the root.
2. `train` beside one of eval, val, valid, validation and test makes two splits, in upper or lower
   case. `train` alone is the whole set.
3. In a split each folder at the top that holds images, at any depth, is a class of its name. Images
   without any folder are one class. Both beside each other are refused.
4. Classes and their numbers are those of training. Another split takes them by name. Where it
   cannot, because it has no class folders or others, its labels are not known.

Folders of systems and tools are no classes. What is left out is counted, with its reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

SPLIT_NAMES = {"train": ("train",), "eval": ("eval", "val", "valid", "validation", "test")}
EVERY_SPLIT = {name for names in SPLIT_NAMES.values() for name in names}
EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pnm"),
}
# What operating systems, storage boxes and editors leave in folders of images.
SYSTEM_NAMES = {
    *("__MACOSX", "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information"),
}

HIDDEN = "files and folders that are hidden or a tool's"
NO_IMAGE = "files that are not named as images are"
EMPTY = "folders without images"
OUTSIDE = "files and folders beside the splits"
DANGLING = "links to nothing"


class LeftOut(dict[str, tuple[int, str]]):
    """What a listing passes over: reason -> (how many files or folders, the first of them)."""

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Counts files or folders of one reason."""
        before, first = self.get(reason, (0, name))
        self[reason] = before + count, first

    def extend(self, others: LeftOut) -> None:
        """Adds the counts of another listing."""
        for reason, (count, first) in others.items():
            self.add(reason, first, count)

    def __str__(self) -> str:
        return ", ".join(
            f"{reason}: {count:,} ({first}{', ...' if count > 1 else ''})"
            for reason, (count, first) in sorted(self.items())
        )


class Image(NamedTuple):
    """Where the bytes of an image lie.

    Attributes:
      file: path of the file, or of the tar that holds it.
      offset: in bytes.
      size: in bytes, -1 for the whole file.
      key: of the order in the set, None for the order of classes and paths.
      name: in messages, empty for the path below the split.
    """

    file: str
    offset: int = 0
    size: int = -1
    key: tuple[int, str] | None = None
    name: str = ""


class Contents(NamedTuple):
    """What lies directly in a folder."""

    images: dict[str, Image]
    folders: dict[str, Node]
    left_out: LeftOut


class Node:
    """A folder of a tree, which is read when it is first looked into.

    Attributes:
      place: what to call it in a message.
    """

    def __init__(self, place: str, read: Callable[[], Contents]):
        self.place = place
        self._read = read

    @functools.cached_property
    def contents(self) -> Contents:
        """Its images, folders, and what was left out."""
        return self._read()


class Part(NamedTuple):
    """One split of a tree.

    Attributes:
      node: its images.
      training: what numbers the classes, None where training is not known.
      has_splits: whether the tree itself says what is held out.
      left_out: what lies beside the splits.
    """

    node: Node
    training: Node | None
    has_splits: bool
    left_out: LeftOut


def is_hidden(name: str) -> bool:
    """Whether a file or folder is an operating system's or a tool's, and never of a data set."""
    return name.startswith(".") or name in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file is named as images are."""
    stem, dot, extension = name.rpartition(".")
    return bool(stem) and f"{dot}{extension}".lower() in EXTENSIONS


def printable(name: str) -> str:
    """Returns a file's name for messages and records: bytes that are no text become escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def images_below(
    node: Node, path: str = "", left_out: LeftOut | None = None
) -> Iterator[tuple[str, Image]]:
    """Yields (path below the node, image) at any depth, and counts what is left out."""
    contents = node.contents
    if left_out is not None:
        left_out.extend(contents.left_out)
    for name, image in contents.images.items():
        yield path + name, image
    for name, folder in contents.folders.items():
        yield from images_below(folder, f"{path}{name}/", left_out)


def holds_images(node: Node) -> bool:
    """Whether there is an image at any depth; looks no further than the first."""
    return any(True for _ in images_below(node))


def unwrap(root: Node) -> Node:
    """Returns the root, or what a wrapper around it holds (rule 1)."""
    node = root
    while len(node.contents.folders) == 1 and not node.contents.images:
        name, inner = next(iter(node.contents.folders.items()))
        if name.lower() in EVERY_SPLIT or inner.contents.images:
            return root
        if split_folder(inner, "train") or len(inner.contents.folders) > 1:
            return inner
        node = inner
    return root


def split_folder(node: Node, split: str) -> Node | None:
    """Returns the folder of a split that a node holds, the first of `SPLIT_NAMES`."""
    folders = node.contents.folders
    for wanted in SPLIT_NAMES[split]:
        for name in (wanted, *folders):
            if name.lower() == wanted and name in folders:
                return folders[name]
    return None


def find_split(root: Node, split: str) -> Part:
    """Returns one split of a tree (rule 2).

    Args:
      root: what `unwrap` returned.
      split: 'train' or 'eval'.

    Raises:
      ValueError: the folder `train` is missing, or may be a split or a class.
    """
    images, folders, left_out = root.contents
    train, held_out = (split_folder(root, name) for name in ("train", "eval"))
    if train and held_out:
        beside = LeftOut(left_out)
        for name in (*images, *(each for each in folders if each.lower() not in EVERY_SPLIT)):
            beside.add(OUTSIDE, printable(name))
        return Part(train if split == "train" else held_out, train, True, beside)
    if train:
        others = [each for each in folders.values() if each is not train and holds_images(each)]
        if others or images:
            raise ValueError(
                "a folder train is a split where a folder val stands beside it, else all there is; "
                f"got {root.place} with train, without val, and with "
                f"{others[0].place if others else min(images)}; name the folder train itself as "
                "the source, or put all classes into it"
            )
        return Part(train, train, False, left_out)
    if held_out and not images and {each.lower() for each in folders} <= EVERY_SPLIT:
        if split == "train":
            raise ValueError(
                f"a set with splits has a folder train; got {root.place} with "
                f"{', '.join(folders)}; add train, or name one of these as the source"
            )
        return Part(held_out, None, True, left_out)
    return Part(root, root, False, LeftOut())


def class_folders(node: Node) -> dict[str, Node]:
    """Returns the classes of a split by their sorted names, none where it is flat (rule 3).

    Raises:
      ValueError: the split holds images and class folders.
    """
    images, folders, _ = node.contents
    classes = {name: folders[name] for name in sorted(folders) if holds_images(folders[name])}
    if images and classes:
        raise ValueError(
            "an image folder holds images or class folders; got "
            f"{node.place} with both, {min(images)} and those in {next(iter(classes))}; move one "
            "kind elsewhere"
        )
    return classes


def label_names(part: Part, own: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Returns the classes in the order of their numbers, and why the labels are not known (rule 4).

    Args:
      part: the split.
      own: its classes, none where it is flat. A flat set is one class with training's file name.

    Returns:
      The names of training's classes, and an empty reason where the split's labels are known.
    """
    if part.training is None:
        return (), f"{part.node.place} has no folder train beside it, which numbers the classes"
    own = set(own)
    classes = tuple(sorted(own) if part.training is part.node else class_folders(part.training))
    if not own and classes:
        return classes, f"{part.node.place} has no class folders"
    unknown = sorted(own - set(classes))
    if unknown:
        return classes, (
            f"{part.node.place} has {len(unknown)} classes that training has not, the first "
            f"{unknown[0]}"
        )
    flat_name = os.path.basename(os.path.abspath(part.training.place)).removesuffix(".tar")
    return classes or (flat_name,), ""
