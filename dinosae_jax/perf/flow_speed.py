"""What `bench` measures besides training steps: latent cache, encoders, the flow's sampler."""

from __future__ import annotations

import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dinosae_jax import config as config_lib
from dinosae_jax import names
from dinosae_jax.data.latents import latent_reader, latent_record, latent_writer
from dinosae_jax.inference import encoding
from dinosae_jax.inference.generator import random_generator
from dinosae_jax.models import autoencoder, flops
from dinosae_jax.perf import step_speed
from dinosae_jax.runtime import console, precision, sharding


def measure_latents(config: ml_collections.ConfigDict) -> dict[str, dict[str, float]]:
    """Writes a cache of random latents in each format and times the reading of training batches.

    Args:
      config: images, tokens, width, batch_size and batches.

    Returns:
      format -> gb_per_second_per_core (bytes of the records read, over the processor time of all
      threads) and images_per_second (by the clock, with two threads).
    """
    speeds: dict[str, dict[str, float]] = {}
    for stored in latent_record.FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            source = _write_random(pathlib.Path(folder), config, stored)
            size = sum(field.nbytes for field in source.fields) * config.batch_size
            _, busy = _read(source, config, threads=0)
            elapsed, _ = _read(source, config, threads=2)
        speeds[stored] = row = {
            "gb_per_second_per_core": config.batches * size / busy / 1e9,
            "images_per_second": config.batches * config.batch_size / elapsed,
        }
        console.report(
            f"latent cache, {stored}: {row['gb_per_second_per_core']:.2f} GB/s per core, "
            f"{row['images_per_second']:.0f} images/s by two threads"
        )
    return speeds


def _write_random(
    folder: pathlib.Path, config: ml_collections.ConfigDict, stored: str
) -> latent_reader.LatentSource:
    """A cache of Gaussian tokens in two shards, without flips."""
    plan = {
        "format": stored,
        "tokens": config.tokens,
        "width": config.width,
        "flipped": False,
        "label_names": ["one"],
        "count": config.images,
        "num_shards": 2,
    }
    random = np.random.default_rng(0)

    def encoded(count: int) -> Iterator[latent_writer.Encoded]:
        for _ in range(count):
            tokens = random.standard_normal((1, 1, config.tokens, config.width), np.float32)
            yield tokens, np.zeros(1, np.int32)

    latent_writer.claim(folder, plan)
    for number in range(2):
        count = len(latent_writer.shard_range(plan, number))
        latent_writer.write_shard(folder, plan, number, encoded(count))
    return latent_reader.LatentSource(folder, latent_writer.finish(folder, plan))


def _read(
    source: latent_reader.LatentSource, config: ml_collections.ConfigDict, threads: int
) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds of `batches` batches after the first."""
    options = {"flip": False, "threads": threads}
    batches = latent_reader.train_batches(source, options, batch_size=config.batch_size, seed=0)
    next(batches)
    started = time.perf_counter(), time.process_time()
    for _ in itertools.islice(batches, config.batches):
        pass
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure_flow(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Speeds of encoding and of sampling images, with random networks.

    Args:
      config: stages, and flow (stage, the name of the networks, '' for none; batch_per_device;
        sampling_steps).

    Returns:
      batch_size, encoded_images_per_second, sampling_steps, sampled_images_per_second.
    """
    if not config.flow.stage:
        return {}
    stage_config = precision.resolve_config(config.stages[config.flow.stage])
    mesh = sharding.make_mesh()
    size = config.flow.batch_per_device * mesh.size
    generator = random_generator(stage_config, mesh)
    side = stage_config.data.image_size
    image = np.random.default_rng(0).integers(0, 256, (size, side, side, 3)).astype(np.uint8)
    placed = jax.device_put(image, sharding.batch_sharding(mesh))
    run = functools.partial(
        encoding.compiled_encode(generator.networks.modules), generator.variables
    )
    labels = np.zeros(size, np.int32)
    draw = functools.partial(
        generator.sample,
        labels,
        key=jax.random.PRNGKey(0),
        steps=config.flow.sampling_steps,
        batch_size=size,
    )
    rates = {
        "batch_size": size,
        "encoded_images_per_second": size / step_speed.call_seconds(lambda: run(placed)),
        "sampling_steps": config.flow.sampling_steps,
        "sampled_images_per_second": size / step_speed.call_seconds(draw),
    }
    console.report(
        f"{config.flow.stage} at batch {size}: encodes "
        f"{rates['encoded_images_per_second']:.1f} images/s, samples "
        f"{rates['sampled_images_per_second']:.2f} images/s in {config.flow.sampling_steps} steps"
    )
    return rates


def measure_encoders(config: ml_collections.ConfigDict) -> dict[str, dict[str, float]]:
    """Speed of published encoders with random weights, as the teacher runs them.

    Args:
      config: encoders (networks, names in `dinosae_jax.encoders`; image_size; batch_per_device).

    Returns:
      network -> batch_size, images_per_second, gflops_per_image.
    """
    mesh = sharding.make_mesh()
    size, side = config.encoders.batch_per_device * mesh.size, config.encoders.image_size
    image = np.random.default_rng(0).integers(0, 256, (size, side, side, 3)).astype(np.uint8)
    placed = jax.device_put(image, sharding.batch_sharding(mesh))
    speeds: dict[str, dict[str, float]] = {}
    for network in config.encoders.networks:
        stage = config_lib.autoencoder_defaults()
        config_lib.use_encoder(stage, network)
        dtype = precision.resolve_config(stage).dtype
        modules = autoencoder.build(stage.model.to_dict(), jnp.dtype(dtype))
        patches = jnp.zeros((1, 1, 1, modules.vit.embed_dim))
        drawn = {"vit": jax.jit(modules.vit.init)(jax.random.PRNGKey(0), patches)}
        variables = sharding.replicate(precision.frozen(drawn, dtype), mesh)
        run = functools.partial(_compiled_teacher(modules), variables)
        grid = side // names.PATCH_SIZE
        speeds[network] = row = {
            "batch_size": size,
            "images_per_second": size / step_speed.call_seconds(functools.partial(run, placed)),
            "gflops_per_image": flops.vit_flops(modules.vit, grid, grid) / 1e9,
        }
        console.report(
            f"{network} at batch {size}, {side} pixels: encodes {row['images_per_second']:.1f} "
            f"images/s ({row['gflops_per_image']:.1f} GFLOPs each)"
        )
    return speeds


@functools.lru_cache
def _compiled_teacher(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    """Jit of (variables, images uint8 [b, h, w, 3]) -> the teacher's tokens [b, n, d]."""

    def encode(variables: autoencoder.Variables, image: jax.Array) -> jax.Array:
        pixels = autoencoder.unit_interval(image)
        return autoencoder.encode_teacher(modules, variables, pixels).tokens

    return jax.jit(encode)
