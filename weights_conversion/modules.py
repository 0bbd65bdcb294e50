"""The modules behind each role, and the shapes of their variables."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax.models import registry
from dinosae_jax.models.dino_v1 import IMAGE_SIDE
from weights_conversion.readers.stored import short

Config = dict[str, Any]
MAX_SIZE = 1 << 20
MAX_TABLE = 1 << 26


def shapes(config: dict[str, Config]) -> dict[str, tuple[int, ...]]:
    """Shapes of all variables, computed without any arithmetic.

    Args:
      config: Role -> keyword arguments.

    Returns:
      `role/collection/path` -> shape.

    Raises:
      ValueError: A module cannot be built from its keyword arguments.
    """
    found: dict[str, tuple[int, ...]] = {}
    for role, kwargs in config.items():
        _check_sizes(role, kwargs)
        try:
            leaves = _leaves(role, registry.build(role, kwargs))
        except (ArithmeticError, TypeError, LookupError, MemoryError) as error:
            raise ValueError(
                f"a {role} has sizes that fit together; got {short(kwargs, 400)}, no {role} can "
                f"be built from it: {short(error)}; check --config"
            ) from None
        found |= {f"{role}/{path}": shape for path, shape in leaves.items()}
    return found


@functools.cache  # the same network is asked for several times, and a large one takes seconds
def _leaves(role: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    variables = functools.partial(module.init, jax.random.key(0), *_inputs(role, module))
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(variables))
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def _check_sizes(role: str, kwargs: Config) -> None:
    """Raises ValueError where a file declares sizes that only an attack would.

    Tables of positions are computed while a module is described: tokens times width numbers.
    """
    numbers = [value for field in kwargs.values() for value in _integers(field)]
    sides = (kwargs.get(name) for name in ("input_size", "table_side", "grid", "statistics_side"))
    side = max((number for field in sides for number in _integers(field)), default=1)
    widths = (kwargs.get(name) for name in ("hidden_size", "embed_dim", "latent_channels"))
    width = max((number for field in widths for number in _integers(field)), default=1)
    if max(numbers, default=0) > MAX_SIZE or side**2 * width > MAX_TABLE:
        raise ValueError(
            f"a {role} has sizes up to {MAX_SIZE}, and at most {MAX_TABLE} numbers in a table of "
            f"positions; got {short(kwargs, 400)}; check --kind and --container"
        )


def _integers(field: Any) -> list[int]:
    values = field if isinstance(field, list | tuple) else [field]
    return [value for value in values if type(value) is int]


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
