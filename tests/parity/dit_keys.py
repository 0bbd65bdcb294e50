"""Recorded torch cases of the diffusion transformers as Flax modules and parameters."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.dit import LightningDiT

_NOT_DITDH = {"patch_size", "wo_shift", "autoguidance_scale", "guidance_model"}


def build(family: str, config: dict):
    """The module that a recorded constructor call describes."""
    if family == "rae_ditdh":
        kept = {k: v for k, v in config.items() if k not in _NOT_DITDH}
        return DiTDH(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
    form = "sinusoidal" if family == "orig_lightningdit" else "fourier"
    return LightningDiT(time_embedding=form, **config)


def read_case(path: pathlib.Path) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """(constructor arguments, {'weights' | 'inputs' | 'outputs' | ...: {name: array}})."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return config, groups


def _path(key: str) -> tuple[str, ...]:
    """`a.0.b` -> ('a_0', 'b'): numbers join the component before them."""
    return tuple(re.sub(r"\.(\d+)", r"_\1", key).split("."))


def _leaf(name: str, key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if name != "weight":
        return name, value
    if "norm" in key:
        return "scale", value
    if "embedding_table" in key:
        return "embedding", value
    return "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_params(weights: dict[str, np.ndarray], encoder_depth: int | None = None) -> dict:
    """Torch state dict -> nested Flax params; blocks stacked, RoPE tables left out.

    encoder_depth splits the one list of blocks of DiT^DH into its two stacks.
    """
    flat: dict[tuple[str, ...], np.ndarray] = {}
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    order = sorted(weights, key=lambda k: [int(p) if p.isdigit() else 0 for p in k.split(".")])
    for key in order:
        if "rope" in key:
            continue
        parent, _, last = key.rpartition(".")
        leaf, value = _leaf(last, key, weights[key])
        block = re.match(r"blocks\.(\d+)\.(.*)", parent)
        if block is None:
            flat[(*_path(parent), leaf) if parent else (leaf,)] = value
            continue
        name = "blocks"
        if encoder_depth is not None:
            name = "blocks_encoder" if int(block[1]) < encoder_depth else "blocks_head"
        stacks.setdefault((name, *_path(block[2]), leaf), []).append(value)
    flat |= {path: np.stack(values) for path, values in stacks.items()}
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(value)
    return tree


def nhwc(x: np.ndarray) -> np.ndarray:
    """Torch's image layout to ours, where x has it."""
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
