"""Reads recorded activations of the reference implementations, in their two layouts.

Autoencoder files name tensors `params.KEY`, `input.NAME`, `output.NAME`; generation files
`weights/KEY`, `guidance_weights/KEY`, `inputs/NAME`, `outputs/NAME`, `intermediates/NAME`. The
header's metadata holds `config`, JSON. Images and latents are NCHW.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.readers.safetensors_file import read_safetensors
from weights_conversion.readers.stored import short

_GROUPS = {
    "params.": "weights",
    "input.": "inputs",
    "output.": "outputs",
    "weights/": "weights",
    "guidance_params.": "guidance_weights",
    "guidance_weights/": "guidance_weights",
    "inputs/": "inputs",
    "outputs/": "outputs",
    "intermediates/": "intermediates",
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file: numpy arrays by name, and the recorded configuration."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    guidance_weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    intermediates: dict[str, np.ndarray]


def read_golden(path: str | Path, reference: str | Path | None = None) -> Golden:
    """Reads a file of recorded activations.

    Args:
      path: The file.
      reference: Its twin, from which a file without inputs takes inputs, outputs and configuration.

    Returns:
      The tensors by group, without their prefixes.

    Raises:
      ValueError: A tensor belongs to no group, or the file has no inputs and there is no twin.
    """
    tensors, metadata = read_safetensors(path)
    groups: dict[str, dict[str, np.ndarray]] = {name: {} for name in _GROUPS.values()}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _GROUPS if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"{Path(path).name}: recorded activations begin with {', '.join(_GROUPS)}; got "
                f"{short(key)}, so this is no file of recorded activations; name another"
            )
        groups[_GROUPS[prefix]][key.removeprefix(prefix)] = np.asarray(tensor)
    golden = Golden(json.loads(metadata.get("config", "{}")), **groups)
    if golden.inputs:
        return golden
    if reference is None:
        raise ValueError(
            f"a recording has inputs, or a twin that has them; got {Path(path).name}, which has no "
            "inputs; name the twin with --reference=FILE"
        )
    twin = read_golden(reference)
    return dataclasses.replace(twin, weights=golden.weights)


def nhwc(array: np.ndarray) -> np.ndarray:
    """[b, c, h, w] -> [b, h, w, c]."""
    return np.transpose(array, (0, 2, 3, 1))


def nchw(array: Any) -> np.ndarray:
    """[b, h, w, c] -> [b, c, h, w]."""
    return np.transpose(np.asarray(array), (0, 3, 1, 2))
