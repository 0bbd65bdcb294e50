"""Encodes an image set into a cache of latents; see `train.latent_cache`."""

from __future__ import annotations

import ml_collections
from etils import epath

from dinosae_jax.runtime import stopping
from dinosae_jax.train import latent_cache


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes the missing shards of a cache; arguments and errors as of `latent_cache.write`."""
    with stopping.StopRequest() as stop:
        latent_cache.write(config, folder, stop)
