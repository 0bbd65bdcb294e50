"""RAE's decoder: a vision transformer from latents to pixels, and the statistics of its latents.

Mirrors GeneralDecoder of bytetriper/RAE and AutoencoderRAE of diffusers (arXiv 2510.11690). Both
are a MAE decoder whose mask token is never used. The blocks are those of the encoders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax.models import layers, positions, resize
from dinosae_jax.models.layers import layer_norm, normal_init
from dinosae_jax.models.vit import Block, dense
from dinosae_jax.runtime import fsdp

Array = jax.Array
EPSILON = 1e-12
STATISTICS_EPSILON = 1e-5


class ViTDecoder(nn.Module):
    """Decoder from a square grid of latents to an image of `patch_size` pixels per token.

    Latents of another grid are brought to this one, after they are embedded, as in RAE: the image
    always has the same size.

    Attributes:
      latent_channels: width of the latents.
      grid: side of the grid of latents.
      hidden_size: width of the transformer.
      depth: number of blocks, stacked under `blocks`.
      num_heads: attention heads.
      ffn_hidden: hidden width of the feed-forward layer.
      patch_size: pixels per token and side.
      in_channels: channels of the image.
      statistics: the second moment of the latents that the weights hold beside the mean:
        "deviation" (diffusers), "variance" (RAE), or "" for no statistics.
      statistics_side: side of the grid of the statistics; 1 for one per channel.
      scan_layers: whether the blocks are a loop in the compiled program, or unrolled.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      dtype: of matrix products; everything else is float32.
    """

    latent_channels: int
    grid: int
    hidden_size: int
    depth: int
    num_heads: int
    ffn_hidden: int
    patch_size: int = 16
    in_channels: int = 3
    statistics: str = ""
    statistics_side: int = 1
    scan_layers: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_heads; got "
                f"{self.hidden_size} and {self.num_heads}; change one of them"
            )
        self.decoder_embed = dense(self.hidden_size, self.dtype, "decoder_embed")
        shape = (1, 1, self.hidden_size)
        self.cls_token = self.param("cls_token", normal_init(0.02), shape, jnp.float32)
        self.pos_embed = self.param("pos_embed", self._table)
        # Whole weights are gathered inside the rematerialised region, so that they are never kept.
        gather = functools.partial(fsdp.gather_block, depth=self.depth)
        block: Any = nn.map_variables(Block, "params", gather, init=True)
        block = layers.rematerialised(block, self.remat, prevent_cse=not self.scan_layers)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=1 if self.scan_layers else self.depth,
        )(
            num_heads=self.num_heads,
            ffn_layer="mlp",
            ffn_hidden=self.ffn_hidden,
            qkv_bias=True,
            intermediates=False,
            dtype=self.dtype,
            layer_scale=False,
            norm_eps=EPSILON,
        )
        self.decoder_norm = layer_norm(epsilon=EPSILON)
        self.decoder_pred = dense(self.in_channels * self.patch_size**2, self.dtype, "decoder_pred")
        if self.statistics:
            side = self.statistics_side
            stored = (self.latent_channels, side, side)
            for name in ("mean", self.statistics):
                self.variable("statistics", name, jnp.zeros if name == "mean" else jnp.ones, stored)

    def _table(self, key: Array) -> Array:
        table = jnp.asarray(positions.sincos_table(self.grid, self.hidden_size))
        return jnp.pad(table, ((1, 0), (0, 0)))[None]

    def __call__(self, z: Array, train: bool = False) -> Array:
        """Image of the latents: `head(features(z))`.

        Args:
          z: [b, h, w, latent_channels] float32.
          train: ignored; no layer is different in training.

        Returns:
          [b, grid*patch_size, grid*patch_size, in_channels] float32, as the network puts it out.
        """
        return self.head(self.features(z, train))

    def features(self, z: Array, train: bool = False) -> Array:
        """Input of the last layer, [b, grid, grid, hidden_size] float32; `train` is ignored."""
        return self.decoder_norm(self.trunk(z))[:, 1:].reshape(-1, *self._grid, self.hidden_size)

    def trunk(self, z: Array) -> Array:
        """The tokens after the last block, the class token first: [b, 1+n, hidden_size]."""
        embedded = self.decoder_embed(z)
        embedded = resize.resize(embedded, self._grid, "bilinear")
        tokens = embedded.reshape(len(z), -1, self.hidden_size)
        cls_token = jnp.broadcast_to(self.cls_token, (len(z), 1, self.hidden_size))
        tokens = jnp.concatenate([cls_token, tokens], axis=1)
        tokens = fsdp.shard_by_example(tokens + jax.lax.stop_gradient(self.pos_embed))
        return self.blocks(tokens, None)[0]

    def head(self, features: Array) -> Array:
        """The last layer alone, its outputs laid out as pixels: [b, h, w, c] -> the image."""
        b, h, w, _ = features.shape
        p, c = self.patch_size, self.in_channels
        patches = self.decoder_pred(features).astype(jnp.float32).reshape(b, h, w, p, p, c)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.grid, self.grid

    @property
    def last_kernel_path(self) -> tuple[str, ...]:
        """Path of the last layer's kernel in the parameters."""
        return ("decoder_pred", "kernel")


def moments(statistics: Mapping[str, Any], grid: tuple[int, int]) -> tuple[Array, Array]:
    """Mean and deviation of latents, each [1, d] or [n, d] float32, that flows are trained with.

    diffusers adds 1e-5 to the standard deviation, RAE to the variance.

    Args:
      statistics: "mean", and "deviation" or "variance"; [d, h, w] each.
      grid: the grid of the latents.

    Raises:
      ValueError: for statistics of another grid.
    """
    mean = jnp.asarray(statistics["mean"])
    if mean.shape[1:] not in ((1, 1), tuple(grid)):
        raise ValueError(
            "statistics of latents have their grid, or one value per channel; got statistics of "
            f"{list(mean.shape[1:])} for a grid of {list(grid)}; use images of the size that they "
            "were measured on"
        )
    if "deviation" in statistics:
        deviation = jnp.asarray(statistics["deviation"]) + STATISTICS_EPSILON
    else:
        deviation = jnp.sqrt(jnp.asarray(statistics["variance"]) + STATISTICS_EPSILON)
    return _rows(mean), _rows(deviation)


def _rows(moment: Array) -> Array:
    """[d, h, w] -> [n, d]."""
    return moment.reshape(moment.shape[0], -1).T


def standardise(statistics: Mapping[str, Any], z: Array) -> Array:
    """Latents [b, n, d] of a square grid with mean 0 and deviation 1; as they are without any."""
    if not statistics:
        return z
    mean, deviation = moments(statistics, _square(z))
    return (z - mean) / deviation


def restore(statistics: Mapping[str, Any], z: Array) -> Array:
    """The inverse of `standardise`."""
    if not statistics:
        return z
    mean, deviation = moments(statistics, _square(z))
    return z * deviation + mean


def _square(z: Array) -> tuple[int, int]:
    return (math.isqrt(z.shape[1]),) * 2
