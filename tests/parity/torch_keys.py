"""Recorded PyTorch parameters under this package's names, by the naming rule alone."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors

Tensors = dict[str, np.ndarray]


def read(path: pathlib.Path) -> tuple[Tensors, Tensors, Tensors, dict]:
    """Params, inputs, outputs (each without its prefix) and config of a recorded file."""
    with safetensors.safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    groups = (under(tensors, f"{name}.") for name in ("params", "input", "output"))
    return (*groups, config)


def under(tensors: Mapping[str, np.ndarray], prefix: str) -> Tensors:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def to_flax(tensors: Mapping[str, np.ndarray], dcae_stages: int = 0) -> dict:
    """{"params": ..., "batch_stats": ...} of a PyTorch state dict.

    `dcae_stages` is the number of stages where they are numbered in DC-AE's order, else 0.
    """
    variables: dict = {"params": {}, "batch_stats": {}}
    for key, tensor in mask_key_bias(stack_blocks(tensors)).items():
        *path, leaf = key.split(".")
        if leaf in ("num_batches_tracked", "bias_mask") or "local_cls_norm" in path:
            continue
        if dcae_stages and path[0] == "stages":
            path[1] = str(dcae_stages - 1 - int(path[1]))
        leaf, value = convert_leaf(leaf, tensor, stacked=path[:1] == ["blocks"])
        node = variables["batch_stats" if leaf.startswith("running") else "params"]
        for name in join_numbers(path):
            node = node.setdefault(name, {})
        node[leaf] = value
    return variables


def join_numbers(path: list[str]) -> list[str]:
    """["op_list", "0", "main"] -> ["op_list_0", "main"]."""
    names: list[str] = []
    for part in path:
        if part.isdigit():
            names[-1] += f"_{part}"
        else:
            names.append(part)
    return names


def convert_leaf(leaf: str, x: np.ndarray, stacked: bool) -> tuple[str, np.ndarray]:
    """Flax's name and layout of a tensor."""
    if leaf != "weight":
        return leaf, x
    ndim = x.ndim - stacked
    if ndim == 4 and x.shape[0] == x.shape[2] == x.shape[3] == 1:
        return "scale", x.reshape(-1)
    if ndim == 4:
        return "kernel", x.transpose(2, 3, 1, 0)
    return ("kernel", np.swapaxes(x, -1, -2)) if ndim == 2 else ("scale", x)


def stack_blocks(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Join blocks.0.a, blocks.1.a ... to blocks.a with a leading axis."""
    depth = 1 + max((int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")), default=-1)
    result = {key: x for key, x in tensors.items() if not key.startswith("blocks.")}
    for name in under(tensors, "blocks.0."):
        result[f"blocks.{name}"] = np.stack([tensors[f"blocks.{i}.{name}"] for i in range(depth)])
    return result


def mask_key_bias(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Multiply qkv biases by their masks, which zero the key part."""
    masks = {k.removesuffix("_mask"): x for k, x in tensors.items() if k.endswith("bias_mask")}
    return {key: x * masks[key] if key in masks else x for key, x in tensors.items()}
