"""Batches of a data set for this process, whichever kind of source it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from dinosae_jax.data import images
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.runtime import sharding

Batches = Iterator[dict[str, np.ndarray]]


Source = images.ImageSource | latent_reader.LatentSource


def fields_of(source: Source) -> tuple[str, ...]:
    """The fields of its batches that a flow is trained on."""
    if isinstance(source, latent_reader.LatentSource):
        return tuple(field.name for field in source.fields)
    return ("image", "label")


def module_of(source: Source) -> Any:
    """The module that makes batches of a source: `data.images` or `data.latents`."""
    return latent_reader if isinstance(source, latent_reader.LatentSource) else images


def training_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    fields: tuple[str, ...],
    batch_size: int,
    start: int = 0,
) -> Batches:
    """This process's rows of the global training batches, from step `start` on."""
    found = module_of(source).train_batches(
        source,
        config.data,
        batch_size=batch_size,
        seed=config.seed,
        start_step=start,
        rows=sharding.local_rows(mesh, batch_size),
    )
    return ({name: batch[name] for name in fields} for batch in found)


def evaluation_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Batches:
    """This process's rows of batches of at most eval.images images, padded to all devices."""
    size = sharding.device_multiple(config.eval.batch_size, mesh)
    limit = -(-config.eval.images // size)
    rows = sharding.local_rows(mesh, size)
    found = module_of(source).eval_batches(source, config.data, batch_size=size, rows=rows)
    return itertools.islice(found, limit)
