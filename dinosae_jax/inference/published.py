"""Published flows: a converted diffusion transformer joined with the autoencoder it was trained on.

RAE's transformers (arXiv 2510.11690) generate latents that are normalised by stored statistics, on
the linear path, with the time shift of the latents' dimension. Their files hold neither autoencoder
nor statistics; an RAE converted with --kind=rae_autoencoder has both.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from dinosae_jax.flow import schedule
from dinosae_jax.inference.autoencoder import complete
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.weights import weight_source

LAST_TIME = 0.001  # of RAE's grid of times, before the shift
POINTS = 50  # of RAE's grid: one more than its updates
REVERSED = "sinusoidal"  # time embedding of the original LightningDiT, whose noise is at time 0


def complete_flow(
    source: weight_source.WeightSource, autoencoder: str | os.PathLike = ""
) -> weight_source.WeightSource:
    """Adds the autoencoder and the flow's record to a converted transformer.

    Args:
      source: any weights; those that are no bare converted transformer are returned as they are.
      autoencoder: folder of the autoencoder.

    Raises:
      ValueError: one line, where there is no autoencoder, or it does not fit the transformer.
    """
    if set(source.variables) != {"dit"} or source.flow:
        if autoencoder:
            raise ValueError(
                "autoencoder names that of a converted flow, which comes without one; got "
                f"{source.path} with {', '.join(sorted(source.variables))}; leave it out"
            )
        return source
    if not autoencoder:
        raise ValueError(
            f"a converted flow needs the autoencoder that it was trained on; got {source.path} "
            "alone; name the folder of one converted with --kind=rae_autoencoder as autoencoder"
        )
    dit = source.model["dit"]
    if dit.get("time_embedding") == REVERSED:
        raise ValueError(
            "RAE's transformers can be sampled, whose data are at time 0; got the original "
            f"LightningDiT in {source.path}; convert one with --kind=rae_ditdh or rae_lightningdit"
        )
    base = complete(weight_source.open_weights(autoencoder))
    check_statistics(base, dit["input_size"])
    convention = LatentConvention.from_dict(base.convention)
    wanted = dataclasses.replace(
        convention, tokens=dit["input_size"] ** 2, width=dit["in_channels"]
    )
    wanted.check_equal(convention, here=str(source.path), there=str(base.path))
    convention = dataclasses.replace(convention, decode_radius=math.sqrt(convention.width))
    return source._replace(
        variables={**base.variables, **source.variables},
        model={**base.model, **source.model},
        convention=convention.to_dict(),
        notes=[*base.notes, *source.notes],
        flow=flow_record(dit),
        weights={**base.weights, **source.weights},
    )


def check_statistics(source: weight_source.WeightSource, side: int) -> None:
    """Refuses an autoencoder whose latents a published flow cannot generate.

    Raises:
      ValueError: without statistics, or with those of another grid than `side` x `side`.
    """
    statistics = source.variables["decoder"].get("statistics")
    if not statistics:
        raise ValueError(
            "a published flow generates latents that are normalised by statistics; got "
            f"{source.path} without any; convert the autoencoder with its file of statistics"
        )
    shape = statistics["mean"].shape
    if shape[1:] not in ((1, 1), (side, side)):
        raise ValueError(
            f"the statistics of latents have the grid of the flow, {side} x {side}; got "
            f"{list(shape[1:])} in {source.path}; convert those of the flow's image size"
        )


def flow_record(dit: dict[str, Any]) -> dict[str, Any]:
    """What `generator.flow_record` has of our own flows, with RAE's values."""
    return {
        "path": "linear",
        "shift": schedule.dimension_shift(dit["input_size"] ** 2, dit["in_channels"]),
        "end": LAST_TIME,
        "sampling": {
            "sampler": "euler_projection",
            "steps": POINTS - 1,
            "guidance": 1.0,
            "interval": [0.0, 1.0],
        },
        "label_names": [str(label) for label in range(dit["num_classes"])],
    }
