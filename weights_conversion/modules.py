"""The modules behind each role, and the shapes of their variables."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dinosae_jax.models import registry
from dinosae_jax.models.dino_v1 import IMAGE_SIDE
from weights_conversion.readers.stored import short

Config = dict[str, Any]


def shapes(config: dict[str, Config]) -> dict[str, tuple[int, ...]]:
    """Shapes of all variables, computed without any arithmetic.

    Args:
      config: Role -> keyword arguments.

    Returns:
      `role/collection/path` -> shape.

    Raises:
      ValueError: A module cannot be built from its keyword arguments.
    """
    found = {}
    for role, kwargs in config.items():
        try:
            module = registry.build(role, kwargs)
            variables = functools.partial(module.init, jax.random.key(0), *_inputs(role, module))
            tree = jax.eval_shape(variables)
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"no {role} can be built from {short(kwargs, 400)}: {short(error)}; check --config"
            ) from None
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found["/".join([role, *(key.key for key in path)])] = leaf.shape
    return found


def _inputs(role: str, module: Any) -> tuple:
    """Arguments that the module can be initialised with."""
    image = (jnp.zeros((1, IMAGE_SIDE, IMAGE_SIDE, 3)),)
    match role:
        case "vit":
            inputs: tuple = (jnp.zeros((1, 1, 1, module.embed_dim)),)
        case "decoder":
            inputs = (jnp.zeros((1, 1, 1, module.latent_channels)),)
        case "dit":
            grid = (1, module.input_size, module.input_size, module.in_channels)
            inputs = (jnp.zeros(grid), jnp.zeros(1), jnp.zeros(1, jnp.int32))
        case "disc_heads":
            inputs = ([jnp.zeros((1, 16, module.channels))] * module.num_heads, False)
        case "lpips":
            inputs = image * 2
        case "inception" | "efficientnet":
            inputs = (jnp.zeros((1, 8, 8, 3), jnp.uint8),)
        case _:
            inputs = image
    return inputs
