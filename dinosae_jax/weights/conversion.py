"""Reads the directory that `weights_conversion.convert` writes.

DIR/conversion.json tells kind, layout, source file and configuration; DIR/weights is an Orbax
checkpoint of {role: {collection: tree}} in the source's dtypes, and `buffers`, the source's tensors
that no model reads. What the reference does to its weights at run time is done here, once: the key
part of DINOv3's qkv bias is masked.

The directory may come from a stranger: nothing in it is read from elsewhere, nothing is run, and
its arrays are read only where together they are at most `MAX_EXPANSION` times its size on disk.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from dinosae_jax.runtime import files, snapshots, untrusted

METADATA_FILE = "conversion.json"
WEIGHTS_FOLDER = "weights"
FORMAT_VERSION = 1
MAX_EXPANSION = 4
AGAIN = "convert the weights again"

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Converted weights, ready for `module.apply(variables[role], ...)`.

    Attributes:
      variables: Role -> collection ("params", "batch_stats", "spectral") -> tree of numpy arrays.
      config: Role -> keyword arguments of the role's module.
      metadata: The whole of conversion.json.
    """

    variables: dict[str, dict[str, Tree]]
    config: dict[str, dict[str, Any]]
    metadata: dict[str, Any]

    @property
    def params(self) -> dict[str, Tree]:
        """Parameters by role, without the other collections."""
        return {role: variables["params"] for role, variables in self.variables.items()}


def is_conversion(directory: str | os.PathLike) -> bool:
    """Whether a directory holds converted weights."""
    return (files.path(directory) / METADATA_FILE).is_file()


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads conversion.json.

    Raises:
      ValueError: There is none, or it is damaged or of another version.
    """
    folder = files.path(directory)
    path = folder / METADATA_FILE
    if not path.is_file():
        raise ValueError(
            f"converted weights have a {METADATA_FILE}; got {folder}, which holds no converted "
            "weights; make them with python -m weights_conversion.convert --kind=K --input=FILE "
            "--output=DIR"
        )
    untrusted.check_inside(folder, path, AGAIN)
    metadata = untrusted.read_json(path, AGAIN)
    if metadata.get("format_version") != FORMAT_VERSION:
        version = untrusted.short(metadata.get("format_version"))
        raise ValueError(
            f"this code reads format version {FORMAT_VERSION}; got format version {version} in "
            f"{path}; {AGAIN}"
        )
    _check_record(path, metadata)
    return metadata


def _check_record(path: epath.Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError where conversion.json is not what `convert` writes."""
    fields = {"kind": str, "layout": str, "files": list, "config": dict, "tensors": list}
    wrong = [name for name, kind in fields.items() if not isinstance(metadata.get(name), kind)]
    model = metadata.get("model", {})  # which older conversions lack
    if not isinstance(model, dict) or not all(map(_is_stated, model.items())):
        wrong.append("model")
    empty = metadata.get("empty")
    if not isinstance(empty, dict) or not all(map(_is_empty_array, empty.values())):
        wrong.append("empty")
    if not wrong:
        config, files = metadata["config"], metadata["files"]
        wrong += [n for n, part in config.items() if not isinstance(part, dict) or "/" in n]
        wrong += [f"files[{i}]" for i, file in enumerate(files) if not _is_file(file)]
    if wrong:
        raise ValueError(
            f"{untrusted.short(path, 300)} is written by weights_conversion.convert; got another "
            f"form of {untrusted.short(', '.join(wrong))}; {AGAIN}"
        )


def _is_stated(item: tuple[str, Any]) -> bool:
    """Whether a field of `model` is one that a model config has beside its roles."""
    return item[0] in ("encoder", "pixel_range") and isinstance(item[1], str)


def _is_file(record: Any) -> bool:
    """Whether an entry of `files` has the fields that are read."""
    if not isinstance(record, dict):
        return False
    renamed, keys = record.get("renamed", {}), record.get("keys")
    texts = [record.get("name"), record.get("container")]
    return (
        isinstance(renamed, dict)
        and type(keys) is int
        and keys >= 0
        and all(isinstance(text, str) for text in (*texts, *renamed.values()))
    )


def _is_empty_array(entry: Any) -> bool:
    """Whether `[shape, dtype]` is of an array without elements."""
    try:
        shape, dtype = entry
        sizes = [size for size in shape if type(size) is int and 0 <= size < 1 << 31]
        has_size = untrusted.dtype(dtype).itemsize > 0
        return 0 in sizes and len(sizes) == len(shape) <= 16 and has_size
    except (TypeError, ValueError):
        return False


def load(directory: str | os.PathLike, roles: Collection[str] | None = None) -> Weights:
    """Loads converted weights as float32, masks applied.

    Args:
      directory: What `weights_conversion.convert` wrote.
      roles: The roles wanted; None for all.

    Returns:
      The weights.

    Raises:
      ValueError: The directory holds no converted weights, or not these roles.
    """
    metadata = read_metadata(directory)
    config = metadata["config"]
    missing = set(roles or ()) - set(config)
    if missing:
        raise ValueError(
            f"the roles {', '.join(sorted(missing))} are wanted; got {directory}, which holds the "
            f"roles {untrusted.short(', '.join(config))}; convert a file that has them"
        )
    stored = restore(directory, metadata)
    buffers = stored.pop("buffers", {})
    wanted = config if roles is None else roles
    try:
        variables = {role: as_float32(stored[role]) for role in wanted}
        if "vit" in variables and has_masked_keys(config):
            mask_key_bias(variables["vit"]["params"], buffers)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the arrays of {directory} are those of its {METADATA_FILE}; got others "
            f"({untrusted.short(repr(error))}); {AGAIN}"
        ) from None
    return Weights(variables, {role: config[role] for role in wanted}, metadata)


def restore(directory: str | os.PathLike, metadata: dict[str, Any]) -> Tree:
    """The stored tree, every tensor in its source's dtype: {role: ..., "buffers": {key: array}}.

    Raises:
      ValueError: The checkpoint is damaged, leaves its directory, or would take much more memory
        than it has bytes.
    """
    tree = read_arrays(snapshots.local(files.path(directory)), WEIGHTS_FOLDER)
    for target, (shape, dtype) in metadata["empty"].items():  # Orbax stores no empty arrays
        parts = target.split("/") if not target.startswith("buffers/") else target.split("/", 1)
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{METADATA_FILE} names each array once; got {untrusted.short(target)} below "
                    f"another array; {AGAIN}"
                )
        node[parts[-1]] = np.zeros(shape, dtype)
    return tree


def read_arrays(directory: epath.Path, name: str) -> Tree:
    """Restores an Orbax checkpoint that a stranger may have written.

    Args:
      directory: the folder that was sent; nothing is read outside it.
      name: of the checkpoint in it.

    Raises:
      ValueError: as `restore`.
    """
    import orbax.checkpoint as ocp

    folder = files.absolute(directory) / name
    check_stored(directory, folder, MAX_EXPANSION, AGAIN)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise not_whole(folder, error, AGAIN) from None


def check_stored(directory: epath.Path, folder: epath.Path, expansion: int, way_out: str) -> None:
    """Looks at an Orbax checkpoint from a stranger before its arrays are read.

    Args:
      directory: what was sent; everything lies in it, links followed.
      folder: the checkpoint, in it.
      expansion: how many times their bytes on disk the arrays may take.
      way_out: what the message tells the reader to do.

    Raises:
      ValueError: one line, where it leaves the directory, is damaged, or would take more.
    """
    import orbax.checkpoint as ocp

    untrusted.check_inside(directory, folder, way_out)
    size = untrusted.check_tree_inside(folder, way_out)
    _check_names(folder, way_out)
    try:
        with ocp.StandardCheckpointer() as checkpointer:  # of a relative path it finds nothing
            declared = checkpointer.metadata(files.absolute(folder))
        declared = getattr(declared, "item_metadata", declared)
        total = sum(_bytes_of(array) for array in _leaves(getattr(declared, "tree", declared)))
        if total > expansion * size:
            raise OverflowError(
                f"arrays of {total} bytes in {size}, more than {expansion} times as many"
            )
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise not_whole(folder, error, way_out) from None


def not_whole(folder: epath.Path, error: Exception, way_out: str) -> ValueError:
    """The refusal, in one line, of a checkpoint whose reading raised `error`."""
    reason = untrusted.short(str(error).strip() or type(error).__name__, 200)
    return ValueError(f"{folder} must be a whole checkpoint; got {reason}; {way_out}")


def _check_names(folder: epath.Path, way_out: str) -> None:
    """Raises ValueError where an array's name could be read as a path out of the folder."""
    record = untrusted.read_json(folder / "_METADATA", way_out)
    tree = record.get("tree_metadata")
    known = record.get("use_ocdbt", True) is True and isinstance(tree, dict)
    odd = [key for key in tree or () if not known or {"/", "\\", "\0"} & set(key) or ".." in key]
    if odd or not known:
        raise ValueError(
            f"{untrusted.short(folder, 300)} must be a checkpoint of one database; got "
            f"{untrusted.short(odd[0]) if odd else 'separate files'}; {way_out}"
        )


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    else:
        yield tree


def _bytes_of(array: Any) -> int:
    """Bytes that reading an array takes: itself, or one chunk of its storage where that is more."""
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biuf" and dtype != ml_dtypes.bfloat16:
        raise TypeError(f"an array is of type {dtype}")
    chunk = getattr(getattr(array, "storage", None), "chunk_shape", None) or ()
    return max(math.prod(array.shape), math.prod(chunk)) * dtype.itemsize


def as_float32(tree: Tree) -> Tree:
    """Converts every floating leaf to float32; others stay."""
    if isinstance(tree, Mapping):
        return {key: as_float32(value) for key, value in tree.items()}
    is_float = np.issubdtype(tree.dtype, np.floating) or tree.dtype.name == "bfloat16"
    return tree.astype(np.float32, copy=False) if is_float else tree


def has_masked_keys(config: Mapping[str, Any]) -> bool:
    """Whether the weights have a ViT of DINOv3's code base, which masks the bias of its keys."""
    return "vit" in config and config["vit"].get("positions", "rope") == "rope"


def mask_key_bias(vit: Tree, buffers: Mapping[str, np.ndarray]) -> None:
    """Masks the key part of DINOv3's qkv bias, in place.

    Where a file has `bias_mask` the bias is multiplied by it; a mask that was never filled is NaN
    and counts as absent. Without a mask the key part is zero, as in every published model.

    Args:
      vit: Parameters of `VisionTransformer`.
      buffers: Source key -> tensor, with the masks `...blocks.N.attn.qkv.bias_mask` if any.
    """
    qkv = vit["blocks"]["attn"]["qkv"]
    if "bias" not in qkv:
        return
    width = qkv["bias"].shape[-1] // 3
    mask = np.ones_like(qkv["bias"])
    mask[:, width : 2 * width] = 0
    for key, stored in buffers.items():
        match = re.search(r"blocks\.(\d+)\.attn\.qkv\.bias_mask$", key)
        if match:
            row = int(match[1])
            mask[row] = np.where(np.isnan(stored), mask[row], stored)
    # Not a product alone: a masked value counts as zero even where it is not finite.
    qkv["bias"] = np.where(mask == 0, 0, qkv["bias"] * mask).astype(np.float32)
