"""The adversarial part of the autoencoder's step: two functions of one micro-batch.

The generator's loss leaves the spectral vectors of the discriminator unchanged; the discriminator's
own step advances them twice, on fakes and then on reals, and sees noise-free fakes rounded to 8
bits. Each call augments with its own draws. The frozen DINO trunk passes gradients to the generator
and is constant in the discriminator's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from dinosae_jax.losses import adversarial, augment
from dinosae_jax.models import autoencoder, registry
from dinosae_jax.models.dino_v1 import DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads

Tree = Any
METRICS = ("gan", "gan_weight", "d_loss", "d_real", "d_fake")


class Discriminator(NamedTuple):
    """The discriminator's modules: a frozen trunk and the trained heads."""

    trunk: DinoV1
    heads: DiscriminatorHeads


class GeneratorGradient(NamedTuple):
    """The loss -mean(logits), its gradient on the images, and the adaptive weight."""

    loss: jax.Array
    cotangent: jax.Array
    weight: jax.Array


class DiscriminatorGradients(NamedTuple):
    """Gradients of the hinge loss, the advanced spectral vectors and the step's scalars."""

    params: Tree
    spectral: Tree
    scalars: dict[str, jax.Array]


def build(dino: Mapping[str, Any], dtype: Any, precision: str = "highest") -> Discriminator:
    """The discriminator on a DINO v1 trunk with these keyword arguments.

    Args:
      dino: of the trunk.
      dtype: of the trunk's products.
      precision: of the products of the heads, which are float32.
    """
    trunk = registry.build("dino", dino, dtype=dtype)
    heads = DiscriminatorHeads(
        num_heads=1 + len(trunk.key_depths), channels=trunk.embed_dim, precision=precision
    )
    return Discriminator(trunk, heads)


def init(discriminator: Discriminator, key: jax.Array) -> dict[str, dict[str, Tree]]:
    """Variables of the roles dino and disc_heads; the heads' spectral norms are converged."""
    trunk_key, heads_key = jax.random.split(key)
    images = jnp.zeros((1, 224, 224, 3))
    activations, trunk = discriminator.trunk.init_with_output(trunk_key, images)
    heads = discriminator.heads.init(heads_key, activations, train=False)
    return {"dino": dict(trunk), "disc_heads": dict(heads)}


def generator_loss_and_grad(
    discriminator: Discriminator,
    variables: Mapping[str, Any],
    head: Callable[[jax.Array, jax.Array], jax.Array],
    kernel: jax.Array,
    features: jax.Array,
    reconstruction: jax.Array,
    reconstruction_cotangent: jax.Array,
    uniforms: jax.Array,
) -> GeneratorGradient:
    """The generator's adversarial loss, its gradient on the reconstruction, its adaptive weight.

    Args:
      discriminator: the modules, static.
      variables: roles dino and disc_heads.
      head: (last kernel, features) -> reconstruction.
      kernel: the kernel of the decoder's last convolution.
      features: the input of that convolution.
      reconstruction: [b, h, w, 3] about [0, 1].
      reconstruction_cotangent: gradient of the weighted pixel losses, like `reconstruction`.
      uniforms: [7, b] draws of the augmentation.
    """

    def loss_of(image: jax.Array) -> jax.Array:
        activations = _activations(discriminator, variables, image, uniforms)
        logits = discriminator.heads.apply(variables["disc_heads"], activations, train=False)
        return adversarial.generator_loss(logits)  # type: ignore[arg-type]

    loss, cotangent = jax.value_and_grad(loss_of)(reconstruction)
    weight = adversarial.last_layer_adaptive_weight(
        head, kernel, features, reconstruction_cotangent, cotangent
    )
    return GeneratorGradient(loss, cotangent, weight)


def discriminator_gradients(
    discriminator: Discriminator,
    variables: Mapping[str, Any],
    real: jax.Array,
    fake: jax.Array,
    uniforms: tuple[jax.Array, jax.Array],
) -> DiscriminatorGradients:
    """Hinge loss of the discriminator and its gradients with respect to the heads.

    Args:
      discriminator: the modules, static.
      variables: roles dino and disc_heads.
      real: [b, h, w, 3] in [0, 1].
      fake: noise-free reconstructions; clipped and rounded to 8 bits here.
      uniforms: draws of the augmentation for reals and for fakes, [7, b] each.
    """
    fake_activations = _activations(
        discriminator, variables, adversarial.quantise(fake), uniforms[1]
    )
    real_activations = _activations(discriminator, variables, real, uniforms[0])
    fixed = jax.lax.stop_gradient((fake_activations, real_activations))

    def loss_of(params: Tree) -> tuple[jax.Array, tuple[Tree, jax.Array, jax.Array]]:
        spectral = variables["disc_heads"]["spectral"]
        logits = []
        for activations in fixed:
            out, updates = discriminator.heads.apply(
                {"params": params, "spectral": spectral},
                activations,
                train=True,
                mutable=["spectral"],
            )
            spectral = updates["spectral"]
            logits.append(out)
        fakes, reals = logits
        return adversarial.discriminator_loss(reals, fakes), (spectral, reals, fakes)

    (loss, (spectral, reals, fakes)), grads = jax.value_and_grad(loss_of, has_aux=True)(
        variables["disc_heads"]["params"]
    )
    scalars = {"d_loss": loss, "d_real": jnp.mean(reals), "d_fake": jnp.mean(fakes)}
    return DiscriminatorGradients(grads, spectral, scalars)


def augment_draws(key: jax.Array, constant: int, index: jax.Array) -> jax.Array:
    """Draws [7, b] for one use of the augmentation, by the images' positions in the batch."""
    return augment.augmentation_uniforms(jax.random.fold_in(key, constant), index)


def last_kernel(modules: autoencoder.AutoencoderModules, decoder: Mapping[str, Any]) -> jax.Array:
    """The kernel of the decoder's last convolution."""
    return traverse_util.flatten_dict(decoder["params"])[modules.decoder.last_kernel_path]


def decoder_head_fn(
    modules: autoencoder.AutoencoderModules, variables: Mapping[str, Any]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (last kernel, features) -> reconstruction, the decoder's other parameters fixed."""

    def head(kernel: jax.Array, features: jax.Array) -> jax.Array:
        flat = traverse_util.flatten_dict(variables["decoder"]["params"])
        flat[modules.decoder.last_kernel_path] = kernel
        decoder = {**variables["decoder"], "params": traverse_util.unflatten_dict(flat)}
        return autoencoder.decode_head(modules, {"decoder": decoder}, features)

    return head


def _activations(
    discriminator: Discriminator,
    variables: Mapping[str, Any],
    images: jax.Array,
    uniforms: jax.Array,
) -> list[jax.Array]:
    augmented = augment.diff_augment(2.0 * images - 1.0, uniforms)
    return discriminator.trunk.apply(variables["dino"], augmented)  # type: ignore[return-value]
