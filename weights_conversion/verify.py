"""Our modules against recordings: python -m weights_conversion.verify --kind=K --golden=FILE.

Builds the model from the file's configuration, converts the file's weights through the tables,
runs its inputs, and prints the largest error of everything recorded. Exit status 0 says that every
error is at most 2e-5 * max(1, largest recorded value), in float32 at the highest matmul precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dinosae_jax.models import registry
from dinosae_jax.weights import conversion
from weights_conversion import mapping, modules, tables
from weights_conversion.convert import nest
from weights_conversion.readers import containers, inputs
from weights_conversion.verification import recorded_config
from weights_conversion.verification.golden import Golden, read_golden
from weights_conversion.verification.replay import REPLAYS

TOLERANCE = 2e-5


def variables_of(
    kind: str, tensors: Mapping[str, np.ndarray], overrides: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts a state dict in memory.

    Args:
      kind: A key of `tables.KINDS`.
      tensors: Key -> array; prefixes of training scripts such as `backbone.` are stripped.
      overrides: Role -> keyword arguments that are known beside the keys.

    Returns:
      Modules by role, and their variables by role, float32 and masked.

    Raises:
      ValueError: The keys or shapes do not fit the kind and the configuration.
    """
    tensors = containers.strip(tensors, kind)
    layout = tables.plan(kind, {k: v.shape for k, v in tensors.items()}, overrides)
    shapes = modules.shapes(layout.config)
    arrays = mapping.convert(tensors, layout, shapes).arrays
    tree = nest(arrays)
    buffers = tree.pop("buffers", {})
    variables = {role: conversion.as_float32(tree[role]) for role in layout.config}
    if conversion.has_masked_keys(layout.config):
        conversion.mask_key_bias(variables["vit"]["params"], buffers)
    return {role: registry.build(role, c) for role, c in layout.config.items()}, variables


def verify(kind: str, golden: Golden) -> tuple[list[str], bool]:
    """Compares everything that a file records.

    Args:
      kind: A key of `REPLAYS`.
      golden: The file.

    Returns:
      A line for each recorded array, and whether all of them are close.

    Raises:
      ValueError: The weights do not fit the kind or the configuration.
    """
    overrides = recorded_config.overrides(kind, golden.config)
    built, variables = variables_of(kind, golden.weights, overrides)
    if golden.guidance_weights:
        config = recorded_config.overrides(kind, golden.config["guidance_model"])
        guide, guide_variables = variables_of(kind, golden.guidance_weights, config)
        built["guide"], variables["guide"] = guide["dit"], guide_variables["dit"]
    computed = REPLAYS[kind](built, variables, golden)
    results = [
        compare(name, recorded, computed.get(name), required=is_required(name, golden))
        for name, recorded in (golden.outputs | golden.intermediates).items()
    ]
    return [line for line, _ in results], bool(results) and all(good for _, good in results)


def is_required(name: str, golden: Golden) -> bool:
    """Whether the model must expose an array: an output, but none that is marked as unused."""
    return name in golden.outputs and not name.endswith("_UNUSED")


def compare(name: str, recorded: np.ndarray, value: Any, required: bool) -> tuple[str, bool]:
    """One line, and whether the error is within the tolerance."""
    if value is None:
        return (
            f"{'FAIL' if required else 'skip'} {name}: the model does not expose it",
            not required,
        )
    value = np.asarray(value)
    if value.shape != recorded.shape:
        return f"FAIL {name}: shape {value.shape}, recorded {recorded.shape}", False
    recorded = recorded.astype(np.float64)
    largest = float(np.max(np.abs(recorded), initial=0.0))
    error = float(np.max(np.abs(value.astype(np.float64) - recorded), initial=0.0))
    bound = TOLERANCE * max(1.0, largest)
    good = error <= bound  # false for NaN
    line = f"{'ok  ' if good else 'FAIL'} {name} error {error:.2e} bound {bound:.1e}"
    return f"{line} largest {largest:.3g}", good


def _read(golden: str, reference: str | None) -> Golden:
    twin = None if reference is None else inputs.user_path(reference)
    return read_golden(inputs.user_path(golden), twin)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="weights_conversion.verify", description=__doc__)
    parser.add_argument("--kind", required=True, choices=list(REPLAYS))
    parser.add_argument("--golden", required=True, help="file of recorded activations")
    parser.add_argument("--reference", help="twin that has the inputs, where --golden has none")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        lines, good = verify(args.kind, _read(args.golden, args.reference))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(
            f"error: a recording has the inputs of its outputs; got none called {error}; record it "
            "again",
            file=sys.stderr,
        )
        return 1
    print("\n".join(lines))
    failed = sum(line.startswith("FAIL") for line in lines)
    print(f"{Path(args.golden).name}: {len(lines)} arrays, {failed} outside the tolerance")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
