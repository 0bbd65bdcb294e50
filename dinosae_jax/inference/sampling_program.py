"""The compiled sampler: noise -> integrated flow -> decode radius -> decoder, one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dinosae_jax.flow import guidance, matching, samplers, schedule, sphere
from dinosae_jax.models import autoencoder
from dinosae_jax.runtime import precision

Tree = Any
Variables = Mapping[str, Any]
DECODED_AT_ONCE = 4  # images per device: the decoder's activations take most of a sampler's memory


class Networks(NamedTuple):
    """The static part of a generator; hashable, part of the key of the compiled sampler."""

    modules: autoencoder.AutoencoderModules
    dit: Any
    path: str
    radius: float
    shift: float
    weaker: Any = None  # transformer of a weaker flow, see `Generator.guided_by`


class Sampling(NamedTuple):
    """How to sample: method, steps, whether guided and at which times, parts of the decoding."""

    sampler: str
    steps: int
    guided: bool
    interval: tuple[float, float]
    parts: int


def decode_parts(images: int) -> int:
    """Smallest number of equal parts with at most `DECODED_AT_ONCE` of a device's images each."""
    return next(
        n for n in range(1, images + 1) if images % n == 0 and images <= n * DECODED_AT_ONCE
    )


@functools.lru_cache
def compile_noise(networks: Networks) -> Callable[..., jax.Array]:
    """Jit of (key, index) -> noise of one example, [n, d]."""
    path = matching.make_path(networks.path, networks.radius)
    shape = (networks.dit.input_size**2, networks.dit.in_channels)
    return jax.jit(lambda key, index: path.prior(matching.example_keys(key, index[None]), shape)[0])


@functools.lru_cache
def compile_generate(networks: Networks, sampling: Sampling) -> Callable[..., jax.Array]:
    """Jit of (variables, noise, labels, {guidance, decode_radius}) -> images."""

    def generate(*arguments: Any) -> jax.Array:
        with precision.products_of(networks.dit.dtype):
            return _generate(networks, sampling, *arguments)

    return jax.jit(generate)


@jax.jit
def as_pictures(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """8-bit images, made on the device: a quarter of the bytes go to the host.

    Args:
      images: [b, h, w, 3] in [0, 1].

    Returns:
      uint8 [b, h, w, 3], rounded as `png.as_picture` does, and whether each is finite, bool [b].
    """
    levels = jnp.clip(jnp.floor(images * 255.0 + 0.5), 0.0, 255.0).astype(jnp.uint8)
    return levels, jnp.isfinite(images).all(axis=(1, 2, 3))


def _generate(
    networks: Networks,
    sampling: Sampling,
    variables: Variables,
    noise: jax.Array,
    labels: jax.Array,
    scales: Mapping[str, jax.Array],
) -> jax.Array:
    """Images [b, h, w, 3] in [0, 1] of noise [b, n, d] and labels [b]."""
    path = matching.make_path(networks.path, networks.radius)

    velocity = _velocity(networks, sampling, variables, labels, scales["guidance"], path.tangent)
    times = schedule.time_grid(sampling.steps, networks.shift)
    z = samplers.sample(velocity, noise, times, sampling.sampler, path.radius)
    if not path.keeps_norms:
        z = sphere.project(z, scales["decode_radius"])
    side = networks.dit.input_size

    def decode(tokens: jax.Array) -> jax.Array:
        images = autoencoder.decode(networks.modules, variables, tokens, (side, side))
        # Flat rows: a TPU would pad the three channels of images to 128.
        return jnp.clip(images, 0.0, 1.0).reshape(len(tokens), -1)

    # Example i is in part i % parts, so that every part is split over all devices.
    parts = jnp.swapaxes(z.reshape(-1, sampling.parts, *z.shape[1:]), 0, 1)
    rows = jnp.swapaxes(jax.lax.map(decode, parts), 0, 1)
    height = side * networks.modules.vit.patch_size
    return rows.reshape(len(z), height, height, 3)


def _velocity(
    networks: Networks,
    sampling: Sampling,
    variables: Variables,
    labels: jax.Array,
    scale: jax.Array,
    tangent: guidance.Tangent,
) -> guidance.Velocity:
    """The velocity to integrate: unguided, classifier-free or autoguided."""

    def bind(network: Any, weights: Tree) -> guidance.Network:
        return lambda x, t, y: network.apply(weights, x, t, y)

    apply = bind(networks.dit, variables["dit"])
    if not sampling.guided:
        return guidance.conditional(apply, labels)
    options: Any = (scale, sampling.interval, tangent)
    if networks.weaker is None:
        return guidance.classifier_free(apply, labels, networks.dit.num_classes, *options)
    return guidance.autoguided(apply, bind(networks.weaker, variables["weaker"]), labels, *options)
