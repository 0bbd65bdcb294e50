"""The latents of an image set, encoded once into a cache that training a flow then reads.

The workdir holds `train` and `eval`, each with ArrayRecord shards and a manifest; it is what
`--config.data.latents` names. Written again, it keeps every shard that has its sha256: it resumes
after an interruption, repairs a damaged cache and checks a finished one. Each process encodes its
own shards on its own devices; all must see the workdir.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from jax.experimental import multihost_utils

from dinosae_jax import names
from dinosae_jax.data import images
from dinosae_jax.data.latents import latent_reader, latent_writer
from dinosae_jax.eval.protocols import inputs, provenance
from dinosae_jax.inference import encoding
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.runtime import console, sharding, stopping
from dinosae_jax.weights import role_files

SPLITS = ("train", "eval")


def write(
    config: ml_collections.ConfigDict, folder: epath.Path, stop: stopping.StopRequest
) -> None:
    """Writes the missing shards of both splits.

    Args:
      config: config of `configs/encode.py`.
      folder: folder of the cache.
      stop: what the caller has entered.

    Raises:
      ValueError: before anything is encoded, for missing weights, images that cannot be read, or a
        workdir that holds another cache.
      stopping.Interrupted: after a signal, with every finished shard kept.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())
    autoencoder = Autoencoder(inputs.open_weights(config), config.dtype, mesh=mesh)
    sources = {split: images.open_images(config.data, split, labelled=True) for split in SPLITS}
    plans = {split: make_plan(config, autoencoder, sources[split], split) for split in SPLITS}
    for split in SPLITS:
        latent_writer.claim(folder / split, plans[split])
    provenance.prepare_workdir(config, folder)
    for note in autoencoder.notes:
        console.report(f"{config.name}: {note}")
    for split in SPLITS:
        write_split(config, autoencoder, sources[split], plans[split], folder / split, stop)


def make_plan(
    config: ml_collections.ConfigDict,
    autoencoder: Autoencoder,
    source: images.ImageSource,
    split: str,
) -> dict[str, Any]:
    """Everything that the shards of one split have in common, as its manifest stores it."""
    data, convention = config.data, autoencoder.convention
    tokens = (data.image_size // PATCH_SIZE) ** 2
    flipped = bool(data.flip) and split == "train"
    shape = (flipped, config.format, tokens, convention.width)
    return {
        "split": split,
        "images": latent_reader.image_recipe(data),
        "images_fingerprint": source.fingerprint,
        "flipped": flipped,
        "encoder": {
            role: role_files.sha256(autoencoder.variables[role]) for role in names.ENCODER_ROLES
        },
        "dtype": str(jnp.dtype(autoencoder.modules.vit.dtype)),
        "norm": convention.norm,
        **({"encoder_reading": convention.encoder} if convention.encoder else {}),
        "format": config.format,
        "tokens": tokens,
        "width": convention.width,
        "label_names": list(source.label_names),
        "count": len(source),
        "num_shards": config.num_shards or latent_writer.shard_count(len(source), *shape),
    }


def write_split(
    config: ml_collections.ConfigDict,
    autoencoder: Autoencoder,
    source: images.ImageSource,
    plan: dict[str, Any],
    folder: epath.Path,
    stop: stopping.StopRequest,
) -> None:
    """Encodes the missing shards, then writes the manifest."""
    process = _process()
    wanted = latent_writer.missing_shards(folder, plan, *process)
    encode = functools.partial(encoding.compiled_encode(autoencoder.modules), autoencoder.variables)
    size = sharding.device_multiple(config.batch_size, autoencoder.mesh)
    started, done = time.monotonic(), 0
    flips = " (each also flipped)" if plan["flipped"] else ""
    with latent_writer.ShardWriter(folder, plan, max(1, config.data.threads)) as writer:
        for number in wanted:
            indices = latent_writer.shard_range(plan, number)
            batches = images.range_batches(source, config.data, indices, size)
            name = f"{config.name} {plan['split']}"
            batches = console.progress(name, batches, len(indices), size)
            encoded = encoding.encode_batches(
                encode, batches, size, plan["flipped"], autoencoder.mesh
            )
            writer.write(number, interruptible(encoded, stop))
            done += len(indices)
            rate = done / (time.monotonic() - started)
            console.report(
                f"{name}: shard {number + 1} of {plan['num_shards']}, {rate:.1f} images/s{flips}"
            )
    multihost_utils.sync_global_devices(f"{plan['split']} shards are written")
    if process[0] == 0:
        latent_writer.finish(folder, plan)
    multihost_utils.sync_global_devices(f"{plan['split']} manifest is written")
    norms = latent_reader.read_manifest(folder / latent_writer.MANIFEST)["norms"]
    console.report(
        f"{config.name} {plan['split']}: {plan['count']} images in {folder}, "
        f"{len(wanted)} shards written by this process, token norm {norms['mean']:.4g} (deviation "
        f"{norms['deviation']:.2g})"
    )


def interruptible(items: Iterator[Any], stop: stopping.StopRequest) -> Iterator[Any]:
    """Yields the items; raises stopping.Interrupted after a signal.

    Processes encode different numbers of batches, so each reads only its own signal.
    """
    for item in items:
        if stop.signal is not None:
            raise stopping.Interrupted("encoding stopped, finished shards are kept", stop.signal)
        yield item


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()
