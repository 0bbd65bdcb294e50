"""The rules engine: what a published layout calls each leaf of our parameter tree.

Our leaves are named after the reference's keys (`blocks.0.attn.qkv.weight` is leaf 0 of the stack
`blocks/attn/qkv/kernel`), so a layout's table only lists where it differs: rows from a path in our
tree (a leaf, or everything below it) to the layout's name. The engine asks for every leaf of the
model and for nothing else, so a table cannot skip a key silently in either direction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Row = str | tuple[str | None, ...]
Shape = tuple[int, ...]

# torch's (out, in), (out, in, k), (out, in, h, w) to (in, out), (k, in, out), (h, w, in, out).
KERNEL_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}
MAX_LISTED = 500
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class MismatchError(ValueError):
    """Keys that are missing, unexpected or misshapen: all of them in one message."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One published layout of a model.

    Attributes:
      name: What conversion.json calls it.
      config: Role -> keyword arguments of its module.
      rows: Path in our tree, `role/module/...` -> the layout's name for it. The longest path that
        fits a leaf counts; what is left of the leaf's path follows the naming rule. `{i}` or
        `{i+3}` in a name stands for the index in a stack of blocks. A tuple names the parts that
        are joined along the last axis; a part that is None does not exist and is zero.
      leaves: The layout's name of a leaf where it is not ours (see `LEAVES`).
      digits: Whether `name_3` of ours is `name.3` there.
      buffers: Patterns of keys that the model does not read and that are kept as stored -> the
        shape that they must have, or None.
      optional: Paths below which leaves may be absent from a file.
      derive: Gives the value of a leaf that the layout never stores, from its path and shape.
      model: What a model config says beside its roles: encoder, pixel_range.
    """

    name: str
    config: dict[str, dict[str, Any]]
    rows: Mapping[str, Row]
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digits: bool = True
    buffers: Mapping[str, Shape | None] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    derive: Callable[[str, Shape], np.ndarray | None] = lambda path, shape: None
    model: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one source tensor goes.

    Attributes:
      key: Its key in the file, below the container.
      dtype: numpy name of the stored dtype.
      shape: Stored shape.
      target: `role/collection/path` in our tree, or `buffers/KEY`.
      index: Position in a stack, or None.
      part: (which, of how many) along the last axis.
    """

    key: str
    dtype: str
    shape: Shape
    target: str
    index: int | None = None
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A tree and where each of its tensors came from.

    Attributes:
      arrays: `role/collection/path` or `buffers/KEY` -> array in its stored dtype.
      entries: One per source tensor, in the file's order.
      derived: Targets that were not in the file but follow from the configuration.
      absent: Leaves of the model that this file leaves out.
    """

    arrays: dict[str, np.ndarray]
    entries: list[Entry]
    derived: list[str]
    absent: list[str]


def source_names(layout: Layout, path: str) -> tuple[str | None, ...]:
    """The layout's names of the leaf `role/module/.../leaf`, one per part, `{i}` left open."""
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        row = layout.rows.get("/".join(parts[:length]))
        if row is not None:
            break
    else:
        raise MismatchError(
            f"every leaf has a row in the layout {layout.name!r}; got none for {path!r}; check "
            "what --config says"
        )
    if isinstance(row, tuple):
        return row
    rest = parts[length:]
    if not rest:
        return (row,)
    leaf = rest.pop()
    if layout.digits:
        rest = [re.sub(r"_(\d+)", r".\1", name) for name in rest]
    names = [row, *rest, layout.leaves.get(leaf, LEAVES.get(leaf, leaf))]
    return (".".join(name for name in names if name),)


def at_index(name: str, index: int) -> str:
    """Fills `{i}` or `{i+offset}` in a name."""
    return re.sub(r"\{i(?:\+(\d+))?\}", lambda m: str(index + int(m[1] or 0)), name)


def to_flax(array: np.ndarray, leaf: str, shape: Shape) -> np.ndarray | None:
    """Brings a torch tensor to a leaf's layout; None where it has another number of axes."""
    if leaf == "kernel":
        axes = KERNEL_AXES.get(array.ndim)
        if axes is None or array.ndim > len(shape):
            return None
        array = array.transpose(axes)
        return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    same = [size for size in array.shape if size != 1] == [size for size in shape if size != 1]
    return array.reshape(shape) if same else array if array.ndim == len(shape) else None


def from_flax(array: np.ndarray, leaf: str, shape: Shape) -> np.ndarray:
    """The way back: the torch tensor of stored `shape` from its part of a leaf."""
    if leaf != "kernel":
        return array.reshape(shape)
    array = array.reshape(array.shape[array.ndim - len(shape) :])
    return array.transpose(np.argsort(KERNEL_AXES[len(shape)]))


def window(array: np.ndarray, entry: Entry) -> np.ndarray:
    """The part of a leaf that one source tensor fills, as a view."""
    view = array if entry.index is None else array[entry.index, ...]
    which, count = entry.part
    if count == 1:
        return view
    width = view.shape[-1] // count
    return view[..., which * width : (which + 1) * width]


def convert(tensors: Mapping[str, Any], layout: Layout, expected: Mapping[str, Shape]) -> Converted:
    """Brings every tensor of a state dict to its place in our tree.

    Args:
      tensors: Key -> array or `StoredTensor`, in the file's order.
      layout: The table.
      expected: `role/collection/path` -> shape of every leaf of the model.

    Returns:
      The tree.

    Raises:
      MismatchError: With every missing, unexpected and misshapen key.
    """
    taken: dict[str, Entry] = {}
    leaves: dict[str, list[Entry]] = {}
    derived: dict[str, np.ndarray] = {}
    missing: list[str] = []
    absent: list[str] = []
    wanted_by_target = {t: list(_wanted(layout, t, shape)) for t, shape in expected.items()}
    left_out = _left_out(layout, wanted_by_target, tensors)
    for target, wanted in wanted_by_target.items():
        found = [entry for entry in wanted if entry.key in tensors]
        value = None if found else _derived(layout, _path(target), expected[target])
        if value is not None:
            derived[target] = value
        elif _path(target).startswith(left_out):
            absent.append(target)
        else:
            missing += [entry.key for entry in wanted if entry.key not in tensors]
            leaves[target] = [_described(entry, tensors[entry.key]) for entry in found]
            taken.update((entry.key, entry) for entry in leaves[target])
    misshapen = [line for t, found in leaves.items() for line in _misshapen(found, expected[t])]
    buffers = _buffers(layout, {key: tensors[key] for key in tensors if key not in taken})
    misshapen += [
        f"{key} {list(entry.shape)}: such a buffer has {list(right)}"
        for key, (entry, right) in buffers.items()
        if right is not None and entry.shape != right
    ]
    taken |= {key: entry for key, (entry, _) in buffers.items()}
    unexpected = [key for key in tensors if key not in taken]
    _raise(layout, missing, unexpected, misshapen)
    arrays = {t: _assemble(found, tensors, expected[t]) for t, found in leaves.items()}
    arrays |= {entry.target: np.asarray(tensors[key]) for key, (entry, _) in buffers.items()}
    entries = [taken[key] for key in tensors]
    return Converted(arrays | derived, entries, list(derived), absent)


def _buffers(layout: Layout, rest: Mapping[str, Any]) -> dict[str, tuple[Entry, Shape | None]]:
    """Of the tensors that no leaf takes, those that are kept as stored, and their right shapes."""
    found = {}
    for key, tensor in rest.items():
        pattern = next((p for p in layout.buffers if re.fullmatch(p, key)), None)
        if pattern is not None:
            entry = Entry(key, str(tensor.dtype), tuple(tensor.shape), f"buffers/{key}")
            found[key] = entry, layout.buffers[pattern]
    return found


def _left_out(
    layout: Layout, wanted: Mapping[str, list[Entry]], tensors: Mapping[str, Any]
) -> tuple[str, ...]:
    """The optional parts of which a file has nothing."""
    present = {
        f"{_path(target)}/"
        for target, entries in wanted.items()
        if any(entry.key in tensors for entry in entries)
    }
    parts = [f"{part}/" for part in layout.optional]
    return tuple(part for part in parts if not any(path.startswith(part) for path in present))


def _path(target: str) -> str:
    """`role/collection/module/leaf` without its collection, as rows name it."""
    role, _, rest = target.split("/", 2)
    return f"{role}/{rest}"


def _derived(layout: Layout, path: str, shape: Shape) -> np.ndarray | None:
    # No file stores what is empty, such as the storage tokens of a model without any.
    return np.zeros(shape, np.float32) if 0 in shape else layout.derive(path, shape)


def _wanted(layout: Layout, target: str, shape: Shape) -> Iterable[Entry]:
    names = source_names(layout, _path(target))
    for which, name in enumerate(names):
        if name is None:
            continue
        part = (which, len(names))
        if "{i" not in name:
            yield Entry(name, "", (), target, None, part)
            continue
        for index in range(shape[0]):
            yield Entry(at_index(name, index), "", (), target, index, part)


def _described(entry: Entry, tensor: Any) -> Entry:
    return dataclasses.replace(entry, dtype=str(tensor.dtype), shape=tuple(tensor.shape))


def _misshapen(entries: list[Entry], shape: Shape) -> Iterable[str]:
    room = np.broadcast_to(np.int8(0), shape)
    for entry in entries:
        wanted = window(room, entry).shape
        tensor = np.broadcast_to(np.int8(0), entry.shape)
        got = to_flax(tensor, entry.target.rsplit("/", 1)[1], wanted)
        if got is None or got.shape != wanted:
            fitting = "" if got is None else f", here {list(got.shape)}"
            yield f"{entry.key} {list(entry.shape)}{fitting}: the model has {list(wanted)}"


def _raise(layout: Layout, missing: list, unexpected: list, misshapen: list) -> None:
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(lists.values()):
        counts = ", ".join(f"{len(keys)} {name}" for name, keys in lists.items() if keys)
        lines = [f"  {name}: {line}" for name, keys in lists.items() for line in _first(keys)]
        raise MismatchError(
            f"the state dict must fit the layout {layout.name!r}; got {counts}; check --kind, or "
            "give with --config what the keys do not tell:\n" + "\n".join(lines)
        )


def _first(lines: list[str]) -> list[str]:
    """Lines for the terminal: of a file of another kind, not all of its thousands of keys."""
    more = len(lines) - MAX_LISTED
    return lines if more <= 0 else [*lines[:MAX_LISTED], f"and {more} more"]


def _assemble(entries: list[Entry], tensors: Mapping[str, Any], shape: Shape) -> np.ndarray:
    """Reads the tensors of one leaf, one at a time, into their places."""
    dtypes = {np.dtype(tensors[entry.key].dtype) for entry in entries}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.result_type(*dtypes)
    leaf = np.zeros(shape, dtype)
    for entry in entries:
        place = window(leaf, entry)
        source = np.asarray(tensors[entry.key])
        place[...] = to_flax(source, entry.target.rsplit("/", 1)[1], place.shape)
    return leaf


def restore(entry: Entry, array: np.ndarray) -> np.ndarray:
    """The source tensor of an entry, bitwise as stored, from the converted array of its target."""
    if not entry.target.startswith("buffers/"):
        array = from_flax(window(array, entry), entry.target.rsplit("/", 1)[1], entry.shape)
    return array.astype(np.dtype(entry.dtype), copy=False).reshape(entry.shape)
