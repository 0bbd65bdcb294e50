"""Model FLOPs of one forward pass of one image, by formula: 2 per multiply-add.

Counts matrix products and convolutions (padding counts as image), each once: no recomputation,
norms, activations, softmax or rotations, which add under 1% at the published sizes. The cost of a
training step follows: three times the forward pass for a network that is trained, twice for a
network that only passes gradients on.
"""

from __future__ import annotations

import itertools

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.decoder_blocks import EVIT_SCALES, EXPAND_RATIO, HEAD_DIM
from dinosae_jax.models.dino_v1 import IMAGE_SIDE, DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads
from dinosae_jax.models.dit import LightningDiT
from dinosae_jax.models.dit_blocks import mlp_hidden
from dinosae_jax.models.lpips import STAGES as VGG_STAGES
from dinosae_jax.models.stem import ConvStem, PatchStem
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.models.vit_decoder import ViTDecoder


def forward_flops(model: LightningDiT | DiTDH) -> int:
    """FLOPs of one velocity: 238.4 G for LightningDiT-XL/1, 323.8 G for DiT^DH-XL (1024 channels).

    Args:
      model: the flow network; only its attributes are read.

    Returns:
      FLOPs per image.
    """
    return _dit_dh(model) if isinstance(model, DiTDH) else _lightning_dit(model)


def _linear(n: int, fan_in: int, fan_out: int) -> int:
    return 2 * n * fan_in * fan_out


def _attention(n: int, d: int) -> int:
    """Projections of queries, keys, values and output; logits and weighted sum over n keys."""
    return _linear(n, d, 4 * d) + attention_products(n, d)


def attention_products(n: int, d: int) -> int:
    """FLOPs of logits and weighted sum over n tokens of width d, one block.

    Both factors are activations, so these cost twice their forward in the backward pass even where
    the network is frozen.
    """
    return 4 * n * n * d


def _feed_forward(n: int, d: int, hidden: int, gated: bool) -> int:
    return _linear(n, d, hidden) * (3 if gated else 2)


def _time_embedder(features: int, d: int) -> int:
    return _linear(1, features, d) + _linear(1, d, d)


def _adaln_block(model: LightningDiT | DiTDH, n: int, d: int, conditions: int, chunks: int) -> int:
    """One block of width d; `conditions` is the number of modulation vectors, 1 or n."""
    hidden = mlp_hidden(d, model.mlp_ratio, model.use_swiglu)
    modulation = _linear(conditions, d, chunks * d)
    return modulation + _attention(n, d) + _feed_forward(n, d, hidden, model.use_swiglu)


def _lightning_dit(model: LightningDiT) -> int:
    d, patch = model.hidden_size, model.patch_size**2
    n = (model.input_size // model.patch_size) ** 2
    block = _adaln_block(model, n, d, 1, 4 if model.wo_shift else 6)
    out_channels = model.in_channels * (2 if model.learn_sigma else 1)
    return (
        _linear(n, patch * model.in_channels, d)
        + _time_embedder(256 if model.time_embedding == "sinusoidal" else 512, d)
        + model.depth * block
        + _linear(1, d, 2 * d)
        + _linear(n, d, patch * out_channels)
    )


def _dit_dh(model: DiTDH) -> int:
    n, c = model.input_size**2, model.in_channels
    (encoder, head), (depth, head_depth) = model.hidden_size, model.depth
    projection = _linear(n, encoder, head) if encoder != head else 0
    return (
        _linear(n, c, encoder)
        + _time_embedder(512, encoder)
        + depth * _adaln_block(model, n, encoder, 1, 6)
        + projection
        + _linear(n, c, head)
        + head_depth * _adaln_block(model, n, head, n, 6)
        + _linear(n, head, 2 * head)
        + _linear(n, head, c)
    )


def vit_flops(model: VisionTransformer, height: int, width: int) -> int:
    """FLOPs of the transformer blocks on a grid of height x width patches (ViT-L, 16x16: 165 G).

    The stem is not counted.
    """
    n, d = height * width + model.class_token + model.num_storage_tokens, model.embed_dim
    gated = model.ffn_layer.startswith("swiglu")
    return model.run_depth * (_attention(n, d) + _feed_forward(n, d, model.ffn_hidden, gated))


def stem_flops(model: ConvStem | PatchStem, height: int, width: int) -> int:
    """FLOPs of a stem on an image of height x width pixels (DINO-SAE's, 256x256: 2.7 G)."""
    if isinstance(model, PatchStem):
        patches = (height // model.patch_size) * (width // model.patch_size)
        return _linear(patches, 3 * model.patch_size**2, model.embed_dim)
    total, channels = 0, (3, *model.widths, model.embed_dim)
    for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        height, width = -(-height // 2), -(-width // 2)
        total += _conv(height * width, c_in, c_out, 7 if i == 0 else 3)
    return total


def _conv(pixels: int, c_in: int, c_out: int, kernel: int = 3) -> int:
    return _linear(pixels, kernel * kernel * c_in, c_out)


def _evit_block(pixels: int, c: int, scales: tuple[int, ...]) -> int:
    """FLOPs of linear attention's convolutions and of the gated convolution.

    The products with the attention's state are left out: 32/C of the 1x1 convolutions around them.
    """
    qkv, branches = 3 * c, 1 + len(scales)
    nearby = sum(_conv(pixels, 1, qkv, scale) + _conv(pixels, HEAD_DIM, qkv, 1) for scale in scales)
    attention = _conv(pixels, c, qkv, 1) + nearby + _conv(pixels, branches * c, c, 1)
    hidden = EXPAND_RATIO * c
    gated = (
        _conv(pixels, c, 2 * hidden, 1) + _conv(pixels, 1, 2 * hidden) + _conv(pixels, hidden, c, 1)
    )
    return attention + gated


def _upsampling(model: Decoder, pixels: int, c_in: int, c_out: int) -> int:
    """FLOPs of an upsampling from `pixels` to four times as many, without its shortcut."""
    shuffle = model.upsample_block_type == "ConvPixelShuffle"
    return _conv(pixels, c_in, 4 * c_out) if shuffle else _conv(4 * pixels, c_in, c_out)


def decoder_flops(model: Decoder | ViTDecoder, height: int, width: int) -> int:
    """FLOPs of a decoder on a grid of height x width latents (16x16: preset A 382 G, B 688 G)."""
    if isinstance(model, ViTDecoder):
        n, d = model.grid**2, model.hidden_size
        block = _attention(n + 1, d) + _feed_forward(n + 1, d, model.ffn_hidden, gated=False)
        embedding = _linear(height * width, model.latent_channels, d)
        return embedding + model.depth * block + head_flops(model, height, width)
    widths, last = model.width_list, len(model.width_list) - 1
    kinds = (
        [model.block_type] * (last + 1) if isinstance(model.block_type, str) else model.block_type
    )
    pixels, c = height * width, widths[-1]
    total = _conv(pixels, model.latent_channels, c)
    for i in range(last, -1, -1):
        if model.depth_list[i] == 0:
            continue
        if i < last:
            total += _upsampling(model, pixels, c, widths[i])
            if model.upsample_shortcut == "InterpolateConv":
                total += _conv(4 * pixels, c, widths[i])
            pixels, c = 4 * pixels, widths[i]
        kind = kinds[i]
        block = (
            2 * _conv(pixels, c, c)
            if kind == "ResBlock"
            else _evit_block(pixels, c, EVIT_SCALES[kind])
        )
        total += model.depth_list[i] * block
    if model.depth_list[0] == 0:
        return total + _upsampling(model, pixels, c, model.in_channels)
    return total + _conv(pixels, c, model.in_channels)


def lpips_flops(height: int, width: int) -> int:
    """FLOPs of LPIPS' VGG16 features of one image (256x256: 40.1 G; a distance needs two)."""
    total, pixels, channels = 0, height * width, 3
    for stage in VGG_STAGES:
        for _, features in stage:
            total += _conv(pixels, channels, features)
            channels = features
        pixels //= 4
    return total


def dino_flops(model: DinoV1) -> int:
    """FLOPs of the discriminator's trunk, which works at 224x224 (ViT-S/8: 44.7 G)."""
    n, d = (IMAGE_SIDE // model.patch_size) ** 2, model.embed_dim
    hidden = int(d * model.mlp_ratio)
    block = _attention(n + 1, d) + _feed_forward(n + 1, d, hidden, gated=False)
    return _linear(n, 3 * model.patch_size**2, d) + model.depth * block


def heads_flops(model: DiscriminatorHeads, tokens: int) -> int:
    """FLOPs of the discriminator's heads on `tokens` tokens each (five heads, 784: 11.6 G)."""
    c = model.channels
    return model.num_heads * _linear(tokens, c, (1 + model.kernel_size) * c + 1)


def head_flops(model: Decoder | ViTDecoder, height: int, width: int) -> int:
    """FLOPs of the decoder's last layer, whose gradients give the GAN's adaptive weight."""
    if isinstance(model, ViTDecoder):
        outputs = model.in_channels * model.patch_size**2
        return _linear(model.grid**2, model.hidden_size, outputs)
    pixels = 4 ** (len(model.width_list) - 1) * height * width
    if model.depth_list[0] == 0:
        return _upsampling(model, pixels // 4, model.width_list[1], model.in_channels)
    return _conv(pixels, model.width_list[0], model.in_channels)
