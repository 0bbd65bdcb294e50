"""The way back: python -m weights_conversion.export --kind=K --input=DIR --output=FILE.safetensors.

Writes the layout that the directory was converted from, every tensor bitwise as it was stored, the
container's prefix included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinosae_jax.weights import conversion
from weights_conversion import mapping
from weights_conversion.convert import FILES_KINDS
from weights_conversion.readers import inputs
from weights_conversion.readers.safetensors_file import write_safetensors
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
    output = inputs.user_path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors; got {output}; rename it")
    tree = conversion.restore(directory, metadata)
    files = [file for file in metadata["files"] for _ in range(file["keys"])]
    entries = [_entry(record) for record in metadata["tensors"]]
    tensors = [
        (_stored_name(file, entry), entry.dtype, entry.shape, lambda e=entry: _restore(tree, e))
        for file, entry in zip(files, entries, strict=True)
    ]
    notes = {"source": json.dumps(metadata["files"]), "format": "pt"}
    write_safetensors(output, tensors, notes)
    return [key for key, *_ in tensors]


def _stored_name(file: dict[str, Any], entry: mapping.Entry) -> str:
    """The tensor's whole name in its file; conversions without `renamed` were of plain keys."""
    return file.get("renamed", {}).get(entry.key, file["container"] + entry.key)


def _entry(record: dict[str, Any]) -> mapping.Entry:
    fields = {**record, "shape": tuple(record["shape"]), "part": tuple(record["part"])}
    return mapping.Entry(**fields)


def _restore(tree: dict[str, Any], entry: mapping.Entry) -> np.ndarray:
    node: Any = tree
    if entry.target.startswith("buffers/"):
        node = tree["buffers"][entry.key]
    else:
        for part in entry.target.split("/"):
            node = node[part]
    return mapping.restore(entry, np.asarray(node))


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
