"""Model FLOPs of one training step: the sum of its forward and backward passes, by formula.

Per image, 2 per multiply-add, from the config alone. A backward pass costs twice the forward pass
where the network is trained (gradients of weights and of inputs) and once where it only passes
gradients on; products of attention have two activations as factors and always cost twice. The input
gradient of a trained network's first layer is counted although it is not needed (under 0.5%).
Recomputation (remat) is not work of the model and is left out, and so is the second backward pass
that micro-batches cost where the GAN has a weight.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_collections

from dinosae_jax import names
from dinosae_jax.models import autoencoder, dino_v1, flops, registry
from dinosae_jax.train import discriminator_step


def step_flops(config: ml_collections.ConfigDict) -> dict[str, int]:
    """FLOPs per image of each part of a training step.

    Args:
      config: config of one autoencoder stage, or of a flow that reads images or cached latents.

    Returns:
      part -> FLOPs.
    """
    side = config.data.image_size
    modules = autoencoder.build(config.model.to_dict())
    if "flow" in config:
        network = registry.build("dit", config.model.dit.to_dict())
        forward = flops.forward_flops(network)
        encoder = 0 if config.data.latents else _encoder(modules, side)
        return {"encoder forward": encoder, "dit forward": forward, "dit backward": 2 * forward}
    terms = _reconstruction(config, modules, side)
    if config.losses.gan > 0:
        terms |= _adversarial(config, modules, side)
    return terms


def train_flops(config: ml_collections.ConfigDict) -> int:
    """FLOPs of one training step per image: the numerator of TFLOP/s and MFU."""
    return sum(step_flops(config).values())


def _seen_by_stem(modules: autoencoder.AutoencoderModules, side: int) -> tuple[int, int]:
    """The image that the stem sees: an encoder's own patches may have another size than tokens."""
    return (side * modules.stem.patch_size // names.PATCH_SIZE,) * 2


def _encoder(modules: autoencoder.AutoencoderModules, side: int) -> int:
    grid = side // names.PATCH_SIZE
    return flops.stem_flops(modules.stem, *_seen_by_stem(modules, side)) + flops.vit_flops(
        modules.vit, grid, grid
    )


def _reconstruction(
    config: ml_collections.ConfigDict, modules: autoencoder.AutoencoderModules, side: int
) -> dict[str, int]:
    """FLOPs of student, teacher, decoder and perceptual loss."""
    grid = side // names.PATCH_SIZE
    stem = flops.stem_flops(modules.stem, *_seen_by_stem(modules, side))
    transformer = flops.vit_flops(modules.vit, grid, grid)
    decoder = flops.decoder_flops(modules.decoder, grid, grid)
    terms = {
        "stem forward": stem,
        "vit forward": transformer,
        "decoder forward": decoder,
        "decoder backward": 2 * decoder,
    }
    if "stem" in config.trainable:
        tokens = grid * grid + modules.vit.class_token + modules.vit.num_storage_tokens
        products = flops.attention_products(tokens, modules.vit.embed_dim)
        terms["vit backward"] = transformer + modules.vit.run_depth * products
        terms["stem backward"] = 2 * stem
    if config.losses.cosine > 0 or config.losses.mse > 0:
        patches = 2 * grid * grid * 3 * modules.vit.patch_size**2 * modules.vit.embed_dim
        terms["teacher forward"] = patches + transformer
    if config.losses.lpips > 0:
        features = flops.lpips_flops(side, side)
        terms |= {"lpips forward": 2 * features, "lpips backward": features}
    return terms


def _adversarial(
    config: ml_collections.ConfigDict, modules: autoencoder.AutoencoderModules, side: int
) -> dict[str, int]:
    """FLOPs of the generator's adversarial loss, the adaptive weight and the discriminator."""
    network = discriminator_step.build(config.model.dino, jnp.float32)
    grid = side // names.PATCH_SIZE
    tokens = (dino_v1.IMAGE_SIDE // network.trunk.patch_size) ** 2
    trunk, heads = flops.dino_flops(network.trunk), flops.heads_flops(network.heads, tokens)
    products = flops.attention_products(tokens + 1, network.trunk.embed_dim)
    terms = {
        "generator loss's discriminator forward": trunk + heads,
        "generator loss's discriminator backward": trunk + network.trunk.depth * products + heads,
        # One forward through the decoder's last layer, two gradients of its kernel.
        "adaptive weight": 3 * flops.head_flops(modules.decoder, grid, grid),
        "discriminator's trunk forward, real and fake": 2 * trunk,
        "discriminator's heads forward, real and fake": 2 * heads,
        "discriminator's heads backward, real and fake": 4 * heads,
    }
    if max(config.latent_noise.tau, config.latent_noise.tau_end) > 0:
        terms["decoder forward without noise"] = flops.decoder_flops(modules.decoder, grid, grid)
    return terms
