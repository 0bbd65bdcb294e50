"""The modules behind each role, and the shapes of their variables."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.dino_v1 import IMAGE_SIDE, DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads
from dinosae_jax.models.dit import LightningDiT
from dinosae_jax.models.efficientnet import EfficientNetLite0
from dinosae_jax.models.inception import InceptionFID
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.models.stem import ConvStem
from dinosae_jax.models.vit import VisionTransformer
from weights_conversion.stored import short

Config = dict[str, Any]


def build(role: str, config: Config) -> Any:
    """Makes the module of a role.

    Args:
      role: stem, vit, decoder, disc_heads, dino, lpips, inception, efficientnet or dit.
      config: Keyword arguments of its class; for dit also `model`, "LightningDiT" or "DiTDH".

    Returns:
      A Linen module.
    """
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    if role == "dit":
        classes: dict[str, Any] = {"LightningDiT": LightningDiT, "DiTDH": DiTDH}
        return classes[config.pop("model")](**config)
    return _CLASSES[role](**config)


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
            module = build(role, kwargs)
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


_CLASSES: dict[str, Any] = {
    "stem": ConvStem,
    "vit": VisionTransformer,
    "decoder": Decoder,
    "disc_heads": DiscriminatorHeads,
    "dino": DinoV1,
    "lpips": LPIPS,
    "inception": InceptionFID,
    "efficientnet": EfficientNetLite0,
}
