"""The precision of computation, and frozen weights stored in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util

Tree = Any
Variables = Mapping[str, Any]

# Role -> layers whose kernels a bfloat16 model stores in bfloat16: the layers that compute in it
# (every convolution of the decoder), and the flow's modulations, a third of its weights.
BFLOAT16_LAYERS = {
    "dit": ("attn", "mlp", "x_embedder", "s_embedder", "s_projector", "adaLN_modulation_1"),
    "vit": ("attn", "mlp"),
    "decoder": ("params",),
}


def cast_kernels_to_bfloat16(variables: Variables) -> dict[str, Tree]:
    """Rounds the kernels of `BFLOAT16_LAYERS` to bfloat16, as most of those layers do at every use.

    Args:
      variables: variables by role; roles that are not in `BFLOAT16_LAYERS` are unchanged.
    """

    def cast(role: str, tree: Tree) -> Tree:
        layers = BFLOAT16_LAYERS.get(role, ())
        flat = traverse_util.flatten_dict(tree)
        kernels = [path for path in flat if path[-1] == "kernel" and set(layers) & set(path)]
        rounded = {path: jnp.asarray(flat[path], jnp.bfloat16) for path in kernels}
        return traverse_util.unflatten_dict({**flat, **rounded})

    return {role: cast(role, tree) for role, tree in variables.items()}


def frozen(variables: Variables, dtype: str) -> Any:
    """Frozen weights in the precision in which a model of this dtype stores them."""
    return cast_kernels_to_bfloat16(variables) if dtype == "bfloat16" else variables


def resolve_dtype(dtype: str) -> str:
    """Replaces 'auto' by bfloat16 on accelerators and float32 on a CPU; keeps other names."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def resolve_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy with every 'auto' of dtype and matmul_precision replaced by what it means here."""
    config = config.copy_and_resolve_references()
    config.dtype = resolve_dtype(config.dtype)
    for part in config.get("matmul_precision", {}):
        config.matmul_precision[part] = matmul_precision(config, part)
    return config


def matmul_precision(config: ml_collections.ConfigDict, part: str) -> str:
    """The precision of a part's products of float32 factors, a name in `jax.lax.Precision`.

    Args:
      config: of a training run, its dtype resolved.
      part: a field of `config.matmul_precision`.
    """
    wanted = config.matmul_precision[part]
    if wanted != "auto":
        return wanted
    return float32_products(config.dtype) if part == "compute" else "highest"


def products_of(dtype: Any) -> Any:
    """Context in which a network of this dtype computes in it, where no config says otherwise."""
    return jax.default_matmul_precision(float32_products(dtype))


def float32_products(dtype: Any) -> str:
    """What makes a network of this dtype compute in it: 'highest' for float32, else 'default'."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
