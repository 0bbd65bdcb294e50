"""One table per family of checkpoints: kind -> the layout that a file's keys show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from weights_conversion.mapping import Layout, Shape
from weights_conversion.tables import dcae, dinosae, dinov3, dit, encoders, metric_networks, rae
from weights_conversion.tables.keys import UnknownLayoutError

Shapes = dict[str, Shape]

KINDS: dict[str, Callable[[Shapes], Layout]] = {
    "dinov3": dinov3.layout,
    "eupe": dinov3.eupe_layout,
    "dinov2": encoders.dinov2,
    "siglip2": encoders.siglip2,
    "mae": encoders.mae,
    "rae_decoder": rae.decoder_layout,
    "rae_autoencoder": rae.autoencoder_layout,
    "dinosae": dinosae.layout,
    "dinosae_stem": dinosae.stem_layout,
    "dinosae_decoder": dinosae.decoder_layout,
    "dcae_decoder": dcae.layout,
    "lightningdit": dit.original_layout,
    "rae_lightningdit": dit.rae_layout,
    "rae_ditdh": dit.ditdh_layout,
    "dino_discriminator": metric_networks.discriminator_layout,
    "lpips_vgg16": metric_networks.lpips_layout,
    "inception_fid": metric_networks.inception_layout,
    "efficientnet_lite0": metric_networks.efficientnet_layout,
}
"""Each function reads the configuration off the keys and shapes of a state dict."""


def plan(kind: str, shapes: Shapes, overrides: dict[str, dict[str, Any]] | None = None) -> Layout:
    """The layout of a state dict, with what the keys do not tell given by hand.

    Args:
      kind: A key of `KINDS`.
      shapes: Key -> shape, without container.
      overrides: Role -> keyword arguments that replace the ones read off the keys.

    Returns:
      The table for `rules.convert`.

    Raises:
      UnknownLayoutError: The keys are not of this kind, or the overrides name another role.
    """
    layout = KINDS[kind](shapes)
    config = {role: dict(kwargs) for role, kwargs in layout.config.items()}
    for role, kwargs in (overrides or {}).items():
        if role not in config:
            raise UnknownLayoutError(
                f"the configuration may name the roles {', '.join(config)}; got {role!r}; change it"
            )
        if not isinstance(kwargs, dict):
            raise UnknownLayoutError(
                f"the configuration of {role} is a dictionary; got {kwargs!r}; write it as "
                f'{{"{role}": {{"field": value}}}}'
            )
        config[role] |= kwargs
    if kind == "rae_ditdh":
        return dit.ditdh_table(config)
    return dataclasses.replace(layout, config=config)
