"""PyTorch checkpoint to Orbax: python -m weights_conversion.convert --kind=K --input=F --output=D.

Reads .safetensors and .pth (without torch, executing nothing). Every tensor is kept as stored; the
record beside the checkpoint is what `weights_conversion.export` writes the file back from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from dinosae_jax import encoders
from dinosae_jax.runtime import buckets, files
from dinosae_jax.weights.conversion import FORMAT_VERSION, METADATA_FILE, WEIGHTS_FOLDER
from weights_conversion import mapping, modules, tables
from weights_conversion.readers import containers, inputs
from weights_conversion.readers.stored import short

PERIODS = "vit/params/rope_embed/periods"
FILES_KINDS = [kind for kind in tables.KINDS if kind not in ("dinosae_stem", "dinosae_decoder")]


def convert_file(
    kind: str,
    given: Sequence[str | Path],
    output: str | Path,
    container: str | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    round_periods_to_bf16: bool = False,
) -> dict[str, Any]:
    """Converts one checkpoint, or several files that make one model.

    Args:
      kind: A key of `tables.KINDS`.
      given: Files with different keys, a folder, or the index of shards (see `inputs.find_files`).
      output: Directory to write; it may hold an earlier conversion, which is replaced.
      container: Where in the files the network is (see `containers.read`).
      overrides: Role -> keyword arguments that the keys do not tell.
      round_periods_to_bf16: Round the RoPE periods of Hugging Face and timm files, which do not
        store them, as facebook's released files have them.

    Returns:
      What was written to conversion.json.

    Raises:
      ValueError: The file, its keys or the output directory cannot be used; see the message.
    """
    output = inputs.user_path(output)
    _check_output(output)
    states = containers.read(inputs.find_files(given), kind, container)
    sources = [_describe(state) for state in states]
    tensors = _merge(states)
    layout = tables.plan(kind, {k: tuple(t.shape) for k, t in tensors.items()}, overrides)
    converted = mapping.convert(tensors, layout, modules.shapes(layout.config))
    _check_constants(converted, layout)
    if round_periods_to_bf16:
        _round_periods(converted, layout.name)
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "layout": layout.name,
        "files": sources,
        "config": layout.config,
        "model": dict(layout.model),
        "round_periods_to_bf16": round_periods_to_bf16,
        "derived": converted.derived,
        "absent": converted.absent,
        "empty": {
            target: [list(array.shape), str(array.dtype)]
            for target, array in converted.arrays.items()
            if not array.size
        },
        "tensors": [dataclasses.asdict(entry) for entry in converted.entries],
    }
    _write(output, converted.arrays, metadata)
    return metadata


def _check_constants(converted: mapping.Converted, layout: mapping.Layout) -> None:
    """Raises ValueError where RAE's file normalises images in another way than its encoder's."""
    if "encoder" not in layout.model:
        return
    how = encoders.family(layout.model).preprocessing
    for key, wanted in (("encoder_mean", how.mean), ("encoder_std", how.std)):
        stored = converted.arrays.get(f"buffers/{key}")
        if stored is not None and not np.allclose(stored.reshape(-1), wanted, atol=1e-4):
            raise ValueError(
                f"an RAE normalises images as its encoder {layout.model['encoder']} does, with "
                f"{key} {list(wanted)}; got {stored.reshape(-1)[:3].tolist()}; this file is of "
                "another family"
            )


def _round_periods(converted: mapping.Converted, layout: str) -> None:
    """Rounds RoPE periods to bfloat16 in place, where the file does not store them."""
    if PERIODS not in converted.derived:
        raise ValueError(
            "--round_periods_to_bf16 is for DINOv3 files without RoPE periods; got the layout "
            f"{layout!r}; leave it out"
        )
    rounded = converted.arrays[PERIODS].astype(ml_dtypes.bfloat16)
    converted.arrays[PERIODS] = rounded.astype(np.float32)


def _describe(state: containers.StateDict) -> dict[str, Any]:
    digest = containers.sha256(state.path)
    return {
        "name": state.path.name,
        "sha256": digest,
        "known_as": containers.KNOWN_FILES.get(digest[:8]),
        "container": state.prefix,
        "renamed": state.renamed,
        "left": state.left,
        "keys": len(state.tensors),
    }


def _merge(states: Sequence[containers.StateDict]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for state in states:
        twice = sorted(set(tensors) & set(state.tensors))
        if twice:
            raise ValueError(
                f"files of one network have different keys; got {short(state.path.name)}, which "
                f"repeats {len(twice)} keys of the files before it ({short(twice[0])}, ...); give "
                "each file once"
            )
        tensors |= state.tensors
    return tensors


def _check_output(output: epath.Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(
            f"--output must be a directory; got {output}, which is a file; name another"
        )
    if output.is_dir() and any(output.iterdir()) and not (output / METADATA_FILE).exists():
        raise ValueError(
            f"--output must be new, empty or an earlier conversion; got {output}, which holds "
            "something else; name another"
        )


def _write(output: epath.Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes the checkpoint, then conversion.json, whose presence says that it is complete."""
    if buckets.is_bucket(output):
        with tempfile.TemporaryDirectory(prefix="dinosae_jax_") as place:
            _write(epath.Path(place), arrays, metadata)
            (output / METADATA_FILE).unlink(missing_ok=True)
            (output / WEIGHTS_FOLDER).rmtree(missing_ok=True)
            files.publish_folder(Path(place), output, last=METADATA_FILE)
        return
    import orbax.checkpoint as ocp

    output.mkdir(parents=True, exist_ok=True)
    (output / METADATA_FILE).unlink(missing_ok=True)
    shutil.rmtree(output / WEIGHTS_FOLDER, ignore_errors=True)
    # Nothing changes the arrays while they are written, so Orbax need not copy all of them first.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=1, use_compression=False, type_handler_registry=registry
    )
    filled = {target: array for target, array in arrays.items() if array.size}
    with files.path_for_glob(output) as folder, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / WEIGHTS_FOLDER, nest(filled))
    text = json.dumps(metadata, indent=1)
    (output / (METADATA_FILE + ".part")).write_text(text)
    (output / (METADATA_FILE + ".part")).rename(output / METADATA_FILE)


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Paths to nested dictionaries; the keys of buffers stay whole."""
    tree: dict[str, Any] = {}
    for target, array in arrays.items():
        parts = target.split("/", 1) if target.startswith("buffers/") else target.split("/")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = array
    return tree


def _report(metadata: dict[str, Any], output: str) -> None:
    for file in metadata["files"]:
        known = f" = {file['known_as']}" if file["known_as"] else ""
        print(f"{file['name']}: {file['keys']} tensors, sha256 {file['sha256'][:8]}...{known}")
        if file["container"]:
            print(f"  took the container {file['container']!r}")
        if file["left"]:
            print(f"  left: {', '.join(file['left'])}")
        if file["renamed"]:
            print(f"  took out words that torch inserts: {len(file['renamed'])} keys")
    kept = [t["key"] for t in metadata["tensors"] if t["target"].startswith("buffers/")]
    print(f"layout {metadata['layout']}, configuration {json.dumps(metadata['config'])}")
    for name, what in (
        (kept, "kept as stored, not read by the model"),
        (metadata["derived"], "not in the file, computed"),
        (metadata["absent"], "not in the file, left out"),
    ):
        if name:
            print(f"{what}: {len(name)} ({', '.join(name[:4])}{', ...' if len(name) > 4 else ''})")
    print(f"wrote {output}")


def _overrides(text: str) -> dict[str, Any]:
    """Parses --config."""
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise argparse.ArgumentTypeError(
            f'a JSON object such as {{"vit": {{"num_heads": 4}}}} is expected; got {text!r}; write '
            "it so"
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="weights_conversion.convert", description=__doc__)
    parser.add_argument("--kind", required=True, choices=FILES_KINDS)
    parser.add_argument(
        "--input",
        required=True,
        action="append",
        help="file, folder or index of shards; several joined by commas, or the flag repeated",
    )
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument(
        "--container",
        help="such as model or teacher.backbone; by default the one that fits the kind",
    )
    parser.add_argument("--config", type=_overrides, help='JSON, such as {"vit": {"num_heads": 4}}')
    parser.add_argument("--round_periods_to_bf16", action="store_true")
    args = parser.parse_args(argv)
    try:
        metadata = convert_file(
            args.kind,
            [path for text in args.input for path in inputs.split_list(text)],
            args.output,
            args.container,
            args.config,
            args.round_periods_to_bf16,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _report(metadata, str(inputs.user_path(args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
