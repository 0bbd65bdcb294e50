"""DINO v1 ViT (S/8, S/16, B/16), the frozen trunk of the discriminator.

It is the network of facebookresearch/dino (vision_transformer.py) as the discriminator of RAE
(arXiv 2510.11690) runs it: every image is resized to 224 x 224, the MLP uses the tanh approximation
of GELU although DINO was trained with the exact one, and no final norm is applied.

Parameter tree (checkpoint key -> path):

    cls_token, pos_embed            cls_token [1, 1, d], pos_embed [1, n+1, d]
    patch_embed.proj.*              patch_embed/proj/{kernel [p, p, 3, d], bias}
    blocks.{i}.norm1|norm2.*        blocks/norm1|norm2/{scale, bias} [depth, d]
    blocks.{i}.attn.qkv|proj.*      blocks/attn/qkv|proj/kernel [depth, in, out], bias [depth, out]
    blocks.{i}.mlp.fc1|fc2.*        blocks/mlp/fc1|fc2/{kernel, bias}
    norm.*                          not read by any module here (a converted tree may hold it)

The weights are frozen by leaving them out of the differentiated arguments; nothing here stops the
gradient with respect to the images, which the generator needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax import names
from dinosae_jax.models import attention, layers

IMAGE_SIDE = 224
LAYER_NORM_EPSILON = 1e-6


def preprocess(images: jax.Array) -> jax.Array:
    """Resizes and normalises images for the trunk.

    Args:
      images: [b, h, w, 3] in [-1, 1], any side.

    Returns:
      [b, 224, 224, 3] float32: plain bilinear (half-pixel centres, no antialiasing), then
      ImageNet mean and standard deviation.
    """
    shape = (images.shape[0], IMAGE_SIDE, IMAGE_SIDE, 3)
    resized = jax.image.resize(images.astype(jnp.float32), shape, "bilinear", antialias=False)
    mean, std = jnp.asarray(names.IMAGENET_MEAN), jnp.asarray(names.IMAGENET_STD)
    return resized * (0.5 / std) + (0.5 - mean) / std


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v; the softmax is computed in float32."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        qkv = layers.Dense(3 * d, dtype=self.dtype, name="qkv")(x)
        mixed = attention.attention(qkv, self.num_heads)
        return layers.Dense(d, dtype=self.dtype, name="proj")(mixed)


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    hidden_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = layers.Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
        hidden = jax.nn.gelu(hidden, approximate=True)
        return layers.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


def _layer_norm(name: str) -> nn.LayerNorm:
    """Layer norm in float32; the variance in two passes, exact where activations are large."""
    return nn.LayerNorm(LAYER_NORM_EPSILON, jnp.float32, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Pre-norm transformer block [b, n, d] -> [b, n, d] with a float32 residual stream."""

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = _layer_norm("norm1")(x)
        x = x + Attention(self.num_heads, self.dtype, name="attn")(normed).astype(x.dtype)
        normed = _layer_norm("norm2")(x)
        hidden_dim = int(x.shape[-1] * self.mlp_ratio)
        return x + Mlp(hidden_dim, self.dtype, name="mlp")(normed).astype(x.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, tokens in row-major order: [b, h, w, 3] -> [b, n, d]."""

    patch_size: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        proj = layers.PatchProjection(self.embed_dim, self.patch_size, self.dtype, name="proj")
        return proj(images).reshape(images.shape[0], -1, self.embed_dim)


class DinoV1(nn.Module):
    """DINO v1 ViT that returns the activations which the discriminator's heads read.

    Attributes:
      patch_size: side of a patch; must divide 224.
      embed_dim: token width d.
      depth: number of blocks.
      num_heads: attention heads.
      key_depths: increasing block indices whose outputs are returned.
      mlp_ratio: hidden width of the MLP over d.
      dtype: of the matmuls and the convolution; residual stream, norms and softmax are float32.
      scan_layers: False unrolls the loop over blocks (same parameters, no while loop).
      remat: 'none', 'dots' (keep the outputs of the weight matmuls) or 'full'.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    key_depths: tuple[int, ...] = (2, 5, 8, 11)
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Computes the final tokens and the outputs of the blocks in `key_depths`.

        Args:
          images: [b, h, w, 3] in [-1, 1], any side.

        Returns:
          1 + len(key_depths) arrays [b, n, d] float32, n = (224 / patch_size)^2, without CLS: the
          final tokens first, then the key depths in order.

        Raises:
          ValueError: if `key_depths` is not an increasing list of block indices.
        """
        _check_key_depths(self.key_depths, self.depth)
        patches = PatchEmbed(self.patch_size, self.embed_dim, self.dtype, name="patch_embed")
        x = patches(preprocess(images)).astype(jnp.float32)
        b, n, d = x.shape
        small = nn.initializers.truncated_normal(0.02)
        cls_token = self.param("cls_token", small, (1, 1, d))
        pos_embed = self.param("pos_embed", small, (1, n + 1, d))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (b, 1, d)), x], axis=1) + pos_embed

        block = Block(self.num_heads, self.mlp_ratio, self.dtype, parent=None)
        stacked = self.param("blocks", _init_stacked, block, self.depth, d)
        run_segment = self._segment_runner(block)
        activations = []
        boundaries = (0, *(depth + 1 for depth in self.key_depths), self.depth)
        for start, end in itertools.pairwise(boundaries):
            x = run_segment(x, jax.tree.map(lambda leaf, s=slice(start, end): leaf[s], stacked))
            activations.append(x[:, 1:])
        return [activations[-1], *activations[:-1]]

    def _segment_runner(self, block: Block) -> Callable[[jax.Array, Any], jax.Array]:
        """Returns a function (tokens, stacked parameters of consecutive blocks) -> tokens.

        Segments are scanned by hand because the outputs of one nn.scan over all blocks would keep
        every block's tokens in memory, not only those of the key depths.
        """

        def step(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return block.apply({"params": params}, x), None  # type: ignore[return-value]

        if self.remat != "none":
            step = jax.checkpoint(step, policy=layers.remat_policy(self.remat))
        unroll = 1 if self.scan_layers else self.depth
        return lambda x, params: jax.lax.scan(step, x, params, unroll=unroll)[0]


def _init_stacked(key: jax.Array, block: Block, depth: int, embed_dim: int) -> Any:
    """Initialises `depth` blocks as one tree whose leaves have a leading depth axis."""
    tokens = jnp.zeros((1, 1, embed_dim))
    return jax.vmap(lambda k: block.init(k, tokens)["params"])(jax.random.split(key, depth))


def _check_key_depths(key_depths: Sequence[int], depth: int) -> None:
    increasing = list(key_depths) == sorted(set(key_depths))
    if not increasing or any(not 0 <= i < depth for i in key_depths):
        raise ValueError(
            f"key_depths must be increasing block indices from 0 to depth - 1 = {depth - 1}; "
            f"got {tuple(key_depths)}; name blocks that this size has"
        )
