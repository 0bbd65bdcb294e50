"""The norms of latent tokens, whose mean is the decode radius."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dinosae_jax.data import loading
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.models import autoencoder
from dinosae_jax.runtime import files, sharding
from dinosae_jax.train import flow_step

MEASURED_IMAGES = 10_000


NORMS_FILE = "latents.json"


def token_norms(
    config: ml_collections.ConfigDict,
    spec: flow_step.StepSpec,
    frozen: flow_step.Variables,
    source: loading.Source,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Mean and standard deviation of the norms of the latent tokens, measured once per workdir.

    Measures training crops of up to `MEASURED_IMAGES` images in the order of training, a small set
    about once. A latent cache has the norms of all its tokens in its manifest.

    Returns:
      mean, deviation, and the number of images or tokens, as `workdir/latents.json` stores them.
    """
    path = workdir / NORMS_FILE
    if isinstance(source, latent_reader.LatentSource):
        return source.manifest["norms"]
    if path.exists():
        return json.loads(path.read_text())

    @jax.jit
    def moments(frozen: Any, image: jax.Array) -> jax.Array:
        scaled = autoencoder.unit_interval(image)
        norms = jnp.linalg.norm(autoencoder.encode(spec.modules, frozen, scaled).tokens, axis=-1)
        return jnp.stack([jnp.mean(norms, axis=-1), jnp.mean(norms**2, axis=-1)], axis=-1)

    size = sharding.device_multiple(config.eval.batch_size, mesh)
    count = -(-min(MEASURED_IMAGES, len(source)) // size)
    batches = loading.training_batches(source, config, mesh, ("image",), size)
    found = [
        sharding.gather(moments(frozen, sharding.put_batch(batch, mesh)["image"]))
        for batch, _ in zip(batches, range(count), strict=False)
    ]
    mean, square = np.concatenate(found).astype(np.float64).mean(axis=0)
    deviation = float(np.sqrt(max(square - mean**2, 0.0)))
    norms = {"mean": float(mean), "deviation": deviation, "images": count * size}
    if jax.process_index() == 0:
        files.write_json(path, norms)
    return norms
