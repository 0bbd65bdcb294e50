"""The way back: python -m weights_conversion.export --kind=K --input=DIR --output=FILE.safetensors.

Writes the layout that the directory was converted from, every tensor bitwise as it was stored, the
container's prefix included.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinosae_jax.runtime import files, untrusted
from dinosae_jax.weights import conversion
from weights_conversion import mapping
from weights_conversion.convert import FILES_KINDS
from weights_conversion.readers import inputs
from weights_conversion.readers.safetensors_file import DTYPES, write_safetensors
from weights_conversion.readers.stored import short


def export_directory(kind: str, directory: str | Path, output: str | Path) -> list[str]:
    """Writes a converted directory as one .safetensors file.

    Args:
      kind: The kind that it was converted as.
      directory: What `convert` wrote.
      output: The file to write.

    Returns:
      The keys written.

    Raises:
      ValueError: The directory is of another kind, or the output is not a .safetensors file.
    """
    directory = inputs.user_path(directory)
    metadata = conversion.read_metadata(directory)
    if metadata["kind"] != kind:
        raise ValueError(
            f"--kind must be what {directory} was converted as; got {kind}, it is of kind "
            f"{short(metadata['kind'])}; change it"
        )
    target = inputs.user_path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors; got {target}; rename it")
    entries = [_entry(record) for record in metadata["tensors"]]
    if sum(file["keys"] for file in metadata["files"]) != len(entries):
        raise _damaged("files whose keys are not the tensors")
    sources = [file for file in metadata["files"] for _ in range(file["keys"])]
    names = [_stored_name(file, entry) for file, entry in zip(sources, entries, strict=True)]
    counts = collections.Counter(names)
    odd = next((n for n in names if counts[n] > 1 or not n.isprintable()), None)
    if odd is not None:
        raise _damaged(f"a name that is no printable line, or twice there: {short(odd)}")
    tree = conversion.restore(directory, metadata)
    for entry in entries:  # before anything is written
        _restore(tree, entry)
    tensors = [
        (name, entry.dtype, entry.shape, lambda e=entry: _restore(tree, e))
        for name, entry in zip(names, entries, strict=True)
    ]
    notes = {"source": json.dumps(metadata["files"]), "format": "pt"}
    with files.publishing(target) as partial:
        write_safetensors(partial, tensors, notes)
    return [key for key, *_ in tensors]


def _stored_name(file: dict[str, Any], entry: mapping.Entry) -> str:
    """The tensor's whole name in its file; conversions without `renamed` were of plain keys."""
    return file.get("renamed", {}).get(entry.key, file["container"] + entry.key)


def _entry(record: Any) -> mapping.Entry:
    """An entry of `tensors`, which a stranger may have written."""
    try:
        fields = {**record, "shape": tuple(record["shape"]), "part": tuple(record["part"])}
        entry = mapping.Entry(**fields)
        which, count = entry.part
        numbers = [which, count, 0 if entry.index is None else entry.index, *entry.shape]
        good = all(type(n) is int and n >= 0 for n in numbers) and which < count
        good = good and all(isinstance(t, str) for t in (entry.key, entry.target))
        if good and untrusted.dtype(entry.dtype) in DTYPES.values():
            return entry
    except (TypeError, KeyError, ValueError):
        pass
    raise _damaged(f"the tensor {short(repr(record), 200)}")


def _damaged(what: str) -> ValueError:
    return ValueError(
        f"{conversion.METADATA_FILE} says where each tensor went; got {what}; {conversion.AGAIN}"
    )


def _restore(tree: dict[str, Any], entry: mapping.Entry) -> np.ndarray:
    """The tensor of an entry, as it was stored.

    Raises:
      ValueError: The tree has no such array.
    """
    buffer = entry.target.startswith("buffers/")
    node: Any = tree
    try:
        for part in ("buffers", entry.key) if buffer else entry.target.split("/"):
            node = node[part]
        if isinstance(node, dict):
            raise KeyError(part)
        return mapping.restore(entry, np.asarray(node))
    except (KeyError, IndexError, TypeError, ValueError):
        where = f"{short(entry.target)} for {short(entry.key)} {list(entry.shape)[:8]}"
        raise _damaged(f"no fitting array {where}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="weights_conversion.export", description=__doc__)
    parser.add_argument("--kind", required=True, choices=FILES_KINDS)
    parser.add_argument("--input", required=True, help="directory that convert wrote")
    parser.add_argument("--output", required=True, help="file to write, .safetensors")
    args = parser.parse_args(argv)
    try:
        keys = export_directory(args.kind, args.input, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(keys)} tensors to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
