"""PyTorch checkpoint to Orbax: python -m weights_conversion.convert --kind=K --input=F --output=D.

Reads .safetensors and .pth (without torch, executing nothing). Every tensor is kept as stored; the
record beside the checkpoint is what `weights_conversion.export` writes the file back from.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dinosae_jax.weights.conversion import FORMAT_VERSION, METADATA_FILE, WEIGHTS_FOLDER
from weights_conversion import mapping, modules, tables
from weights_conversion.readers import containers

PERIODS = "vit/params/rope_embed/periods"
FILES_KINDS = [kind for kind in tables.KINDS if kind not in ("dinosae_stem", "dinosae_decoder")]


def convert_file(
    kind: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    container: str | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    round_periods_to_bf16: bool = False,
) -> dict[str, Any]:
    """Converts one checkpoint, or several files that make one model.

    Args:
      kind: A key of `tables.KINDS`.
      inputs: The files; their keys must differ.
      output: Directory to write; it may hold an earlier conversion, which is replaced.
      container: Which container of the files to take (see `containers.read`).
      overrides: Role -> keyword arguments that the keys do not tell.
      round_periods_to_bf16: Round the RoPE periods of Hugging Face and timm files, which do not
        store them, as facebook's released files have them.

    Returns:
      What was written to conversion.json.

    Raises:
      ValueError: The file, its keys or the output directory cannot be used; see the message.
    """
    output = Path(output)
    _check_output(output)
    sources = [(Path(path), containers.read(path, container)) for path in inputs]
    files = [_describe(path, state) for path, state in sources]
    tensors = _merge(sources)
    layout = tables.plan(kind, {k: tuple(t.shape) for k, t in tensors.items()}, overrides)
    converted = mapping.convert(tensors, layout, modules.shapes(layout.config))
    if round_periods_to_bf16:
        _round_periods(converted, layout.name)
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "layout": layout.name,
        "files": files,
        "config": layout.config,
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


def _round_periods(converted: mapping.Converted, layout: str) -> None:
    """Rounds RoPE periods to bfloat16 in place, where the file does not store them."""
    if PERIODS not in converted.derived:
        raise ValueError(
            f"--round_periods_to_bf16 is for DINOv3 files without RoPE periods, the layout here is "
            f"{layout!r}: leave it out"
        )
    rounded = converted.arrays[PERIODS].astype(ml_dtypes.bfloat16)
    converted.arrays[PERIODS] = rounded.astype(np.float32)


def _describe(path: Path, state: containers.StateDict) -> dict[str, Any]:
    digest = containers.sha256(path)
    return {
        "name": path.name,
        "sha256": digest,
        "known_as": containers.KNOWN_FILES.get(digest[:8]),
        "container": state.prefix,
        "left": state.left,
        "keys": len(state.tensors),
    }


def _merge(sources: list[tuple[Path, containers.StateDict]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for path, state in sources:
        twice = sorted(set(tensors) & set(state.tensors))
        if twice:
            raise ValueError(
                f"{path.name} repeats {len(twice)} keys of the files before it ({twice[0]}, ...): "
                "give files with different keys"
            )
        tensors |= state.tensors
    return tensors


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory, {output} is a file: choose another")
    if output.is_dir() and any(output.iterdir()) and not (output / METADATA_FILE).exists():
        raise ValueError(
            f"--output must be new, empty or an earlier conversion, {output} holds something else: "
            "choose another"
        )


def _write(output: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes the checkpoint, then conversion.json, whose presence says that it is complete."""
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
    with ocp.Checkpointer(handler) as checkpointer:
        filled = {target: array for target, array in arrays.items() if array.size}
        checkpointer.save(output.absolute() / WEIGHTS_FOLDER, nest(filled))
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
            f'it is JSON such as {{"vit": {{"num_heads": 4}}}}, got {text!r}: write it so'
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="weights_conversion.convert", description=__doc__)
    parser.add_argument("--kind", required=True, choices=FILES_KINDS)
    parser.add_argument("--input", required=True, help="file, or files joined by commas")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--container", help="such as model; the default is ema, model, state_dict")
    parser.add_argument("--config", type=_overrides, help='JSON, such as {"vit": {"num_heads": 4}}')
    parser.add_argument("--round_periods_to_bf16", action="store_true")
    args = parser.parse_args(argv)
    try:
        metadata = convert_file(
            args.kind,
            args.input.split(","),
            args.output,
            args.container,
            args.config,
            args.round_periods_to_bf16,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _report(metadata, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
