"""Role -> class: the one table from which every network is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.dino_v1 import DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads
from dinosae_jax.models.dit import LightningDiT
from dinosae_jax.models.efficientnet import EfficientNetLite0
from dinosae_jax.models.inception import InceptionFID
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.models.stem import ConvStem, PatchStem
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.models.vit_decoder import ViTDecoder

CLASSES: dict[str, Any] = {
    "stem": {"conv": ConvStem, "patch": PatchStem},
    "vit": VisionTransformer,
    "decoder": {"conv": Decoder, "vit": ViTDecoder},
    "disc_heads": DiscriminatorHeads,
    "dino": DinoV1,
    "lpips": LPIPS,
    "inception": InceptionFID,
    "efficientnet": EfficientNetLite0,
    "dit": {"LightningDiT": LightningDiT, "DiTDH": DiTDH},
}
# Role with several classes -> the field that names the class, and the name where it is absent.
CHOICES = {
    "stem": ("kind", "conv"),
    "decoder": ("kind", "conv"),
    "dit": ("model", "LightningDiT"),
}


def build(role: str, config: Mapping[str, Any], **others: Any) -> Any:
    """Makes the module of a role.

    Args:
      role: a key of `CLASSES`.
      config: keyword arguments of its class, lists instead of tuples allowed; for a stem and a
        decoder also `kind`, for a dit also `model`, which name the class.
      **others: more keyword arguments, such as dtype.

    Returns:
      A Linen module, hashable.

    Raises:
      ValueError: for an unknown `kind` or `model`.
      TypeError: for a keyword that the class does not take.
    """
    arguments = as_tuples(dict(config))
    network = CLASSES[role]
    if role in CHOICES:
        field, default = CHOICES[role]
        name = arguments.pop(field, default)
        if name not in network:
            raise ValueError(
                f"model.{role}.{field} must be one of {', '.join(network)}; got {name!r}; "
                "choose one of them"
            )
        network = network[name]
    return network(**arguments, **others)


def as_tuples(value: Any) -> Any:
    """Replaces the lists of JSON by tuples: modules, keys of compiled functions, are hashable."""
    if isinstance(value, Mapping):
        return {name: as_tuples(part) for name, part in value.items()}
    return tuple(as_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def init_dit(network: Any, key: jax.Array) -> dict[str, Any]:
    """Random variables of a diffusion transformer; call it under `jax.jit`."""
    side, channels = network.input_size, network.in_channels
    latents = jnp.zeros((1, side * side, channels))
    return dict(network.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32)))
