"""Encoding of batches of images, one batch ahead of the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dinosae_jax.data.latents import latent_writer
from dinosae_jax.inference.batching import one_behind
from dinosae_jax.models import autoencoder as autoencoder_lib
from dinosae_jax.runtime import precision, sharding

Encode = Callable[[np.ndarray], jax.Array]


def encode_batches(
    encode: Encode,
    batches: Iterator[dict[str, np.ndarray]],
    size: int,
    flipped: bool,
    mesh: jax.sharding.Mesh,
) -> Iterator[latent_writer.Encoded]:
    """Tokens float32 [b, v, n, d] of images and of flipped images, and labels, batch by batch.

    The tokens come as a list of b images, each with its v arrays [n, d]: a copy that joins them
    would take as long as packing them.
    """
    place = sharding.batch_sharding(mesh)

    def running() -> Iterator[tuple[list[jax.Array], np.ndarray]]:
        for batch in batches:
            image = batch["image"]
            if len(image) < size:
                image = np.concatenate(
                    [image, np.zeros((size - len(image), *image.shape[1:]), np.uint8)]
                )
            with jax.set_mesh(mesh):
                placed = jax.device_put(image, place)
                views = (placed, _mirrored(placed)) if flipped else (placed,)
                encoded = [encode(view) for view in views]
            yield encoded, batch["label"]

    for variants, labels in one_behind(running()):
        tokens = list(zip(*(np.asarray(variant) for variant in variants), strict=True))
        yield tokens[: len(labels)], labels


@jax.jit
def _mirrored(image: jax.Array) -> jax.Array:
    """Images uint8 [b, h, w, 3] left to right."""
    return image[:, :, ::-1]


@functools.lru_cache
def compiled_encode(modules: autoencoder_lib.AutoencoderModules) -> Callable[..., jax.Array]:
    """Jit of (variables, images uint8 [b, h, w, 3]) -> tokens float32 [b, n, d]."""

    def encode(variables: autoencoder_lib.Variables, image: jax.Array) -> jax.Array:
        pixels = autoencoder_lib.unit_interval(image)
        with precision.products_of(modules.vit.dtype):
            return autoencoder_lib.encode(modules, variables, pixels).tokens

    return jax.jit(encode)
