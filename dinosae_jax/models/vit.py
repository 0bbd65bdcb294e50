"""The DINOv3 vision transformer, all seven published sizes.

Mirrors DinoVisionTransformer of facebookresearch/dinov3 in evaluation mode. The key part of the
qkv bias is masked to zero there (`mask_k_bias`); here it is zeroed when a checkpoint is loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax.models import attention, layers, rope
from dinosae_jax.models.layers import layer_norm, normal_init
from dinosae_jax.models.stem import PatchStem

Array = jax.Array


class ViTOutput(NamedTuple):
    """What the transformer returns; arrays are float32.

    cls: [b, d] class token after the final norm.
    storage: [b, s, d] storage tokens after the final norm.
    patches: [b, n, d] patch tokens after the final norm.
    prenorm: [b, 1+s+n, d] all tokens before the final norm.
    intermediates: None, or a dictionary of tokens_in [b, 1+s+n, d], rope_sin and rope_cos
      [n, head width], after_attn and out [depth, b, 1+s+n, d].
    """

    cls: Array
    storage: Array
    patches: Array
    prenorm: Array
    intermediates: dict[str, Array] | None


class Attention(nn.Module):
    """Self-attention over all tokens with rotary positions.

    [b, n, d] -> [b, n, d] in `dtype`; rotation and softmax in float32.
    """

    num_heads: int
    qkv_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, rotation: attention.Rotation) -> Array:
        d = x.shape[-1]
        qkv = dense(3 * d, self.dtype, "qkv", use_bias=self.qkv_bias)(x)
        return dense(d, self.dtype, "proj")(attention.attention(qkv, self.num_heads, rotation))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them. [b, n, d] -> [b, n, d] in `dtype`."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = jax.nn.gelu(dense(self.hidden, self.dtype, "fc1")(x), approximate=False)
        y = layers.materialised(y)
        return dense(x.shape[-1], self.dtype, "fc2")(y)


class SwiGlu(nn.Module):
    """Gated feed-forward w3(silu(w1 x) * w2 x). [b, n, d] -> [b, n, d] in `dtype`."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = jax.nn.silu(dense(self.hidden, self.dtype, "w1")(x))
        value = dense(self.hidden, self.dtype, "w2")(x)
        return dense(x.shape[-1], self.dtype, "w3")(gate * value)


FFN_LAYERS: dict[str, type[Mlp] | type[SwiGlu]] = {"mlp": Mlp, "swiglu": SwiGlu}


class LayerScale(nn.Module):
    """Learned factor per channel, in float32. [b, n, d] -> [b, n, d] float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.constant(1e-5)
        gamma = self.param("gamma", init, (x.shape[-1],), jnp.float32)
        return gamma * x.astype(jnp.float32)


class Block(nn.Module):
    """Pre-norm transformer block on a float32 residual stream.

    [b, n, d] float32 -> ([b, n, d] float32, {"after_attn", "out"} or None).
    """

    num_heads: int
    ffn_layer: str
    ffn_hidden: int
    qkv_bias: bool
    intermediates: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Array, rotation: attention.Rotation
    ) -> tuple[Array, dict[str, Array] | None]:
        mix = Attention(self.num_heads, self.qkv_bias, self.dtype, name="attn")
        y = mix(layer_norm("norm1")(x), rotation)
        after_attn = x + LayerScale(name="ls1")(y)
        y = FFN_LAYERS[self.ffn_layer](self.ffn_hidden, self.dtype, name="mlp")(
            layer_norm("norm2")(after_attn)
        )
        x = after_attn + LayerScale(name="ls2")(y)
        return x, {"after_attn": after_attn, "out": x} if self.intermediates else None


class RopeEmbed(nn.Module):
    """Holds the periods, as a checkpoint may override them; they are never trained."""

    head_dim: int

    @nn.compact
    def __call__(self, height: int, width: int) -> tuple[Array, Array]:
        periods = self.param("periods", lambda _: rope.default_periods(self.head_dim))
        return rope.rope_table(jax.lax.stop_gradient(periods), height, width)


class VisionTransformer(nn.Module):
    """DINOv3 from a grid of patch tokens to normed tokens.

    `embed_patches` is the teacher's way from images to such a grid, a `ConvStem` the student's;
    both feed `__call__`. The parameters of the patch embedding exist either way.

    Attributes:
      embed_dim: width d.
      depth: number of blocks; their parameters are stacked under `blocks`.
      num_heads: attention heads.
      ffn_hidden: hidden width of the feed-forward layer, as used.
      ffn_layer: "mlp" (exact GELU) or "swiglu".
      qkv_bias: whether q, k and v have a bias.
      num_storage_tokens: storage (register) tokens between class token and patches.
      patch_size: side of a patch in pixels.
      scan_layers: whether the blocks are a loop in the compiled program, or unrolled.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
      dtype: of matrix products and convolutions; everything else is float32.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn_hidden: int
    ffn_layer: str = "mlp"
    qkv_bias: bool = True
    num_storage_tokens: int = 4
    patch_size: int = 16
    scan_layers: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads; got {self.embed_dim} and "
                f"{self.num_heads}; change one of them"
            )
        if self.ffn_layer not in FFN_LAYERS:
            raise ValueError(
                f"ffn_layer is 'mlp' or 'swiglu'; got {self.ffn_layer!r}; choose one of them"
            )
        normal, zeros = normal_init(0.02), nn.initializers.zeros
        d, s = self.embed_dim, self.num_storage_tokens
        self.patch_embed = PatchStem(d, self.patch_size, self.dtype)
        self.rope_embed = RopeEmbed(d // self.num_heads)
        self.cls_token = self.param("cls_token", normal, (1, 1, d), jnp.float32)
        self.storage_tokens = self.param("storage_tokens", normal, (1, s, d), jnp.float32)
        self.mask_token = self.param("mask_token", zeros, (1, d), jnp.float32)
        self.norm = layer_norm()

    def embed_patches(self, images: Array) -> Array:
        """Patch grid of normalised images by DINOv3's own convolution.

        Args:
          images: [b, H, W, 3] float32, mean and standard deviation of the training set removed.

        Returns:
          [b, H//patch_size, W//patch_size, d] float32.
        """
        return self.patch_embed(images)

    @nn.compact
    def __call__(
        self, patches: Array, mask: Array | None = None, *, intermediates: bool = False
    ) -> ViTOutput:
        """Tokens of a grid of patches, of any height and width.

        Args:
          patches: [b, h, w, d] patch tokens, from `embed_patches` or from a stem.
          mask: [b, n] bool; patches that are replaced by the mask token.
          intermediates: whether to return the outputs inside the blocks too.

        Returns:
          A `ViTOutput`.
        """
        if self.is_initializing():
            self.patch_embed(jnp.zeros((1, self.patch_size, self.patch_size, 3)))
        b, h, w, d = patches.shape
        tokens = patches.reshape(b, h * w, d).astype(jnp.float32)
        if mask is not None:
            tokens = jnp.where(mask[..., None], self.mask_token, tokens)
        prefix = jnp.concatenate([self.cls_token, self.storage_tokens], axis=1)
        count = prefix.shape[1]
        tokens = jnp.concatenate([jnp.broadcast_to(prefix, (b, count, d)), tokens], axis=1)
        sin, cos = self.rope_embed(h, w)
        states: dict[str, Array] | None
        all_sin, all_cos = rope.prepend_identity((sin, cos), count)
        half = sin.shape[1] // 2
        rotation = attention.Rotation(all_cos, all_sin, distance=half)
        prenorm, states = self._make_blocks(intermediates)(tokens, rotation)
        if states is not None:
            states = {"tokens_in": tokens, "rope_sin": sin, "rope_cos": cos, **states}
        normed = self.norm(prenorm)
        return ViTOutput(normed[:, 0], normed[:, 1:count], normed[:, count:], prenorm, states)

    def _make_blocks(self, intermediates: bool) -> nn.Module:
        """The stack of blocks: one scanned module, whatever the unrolling and rematerialisation."""
        blocks = nn.scan(
            layers.rematerialised(Block, self.remat, prevent_cse=not self.scan_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=1 if self.scan_layers else self.depth,
        )
        return blocks(
            self.num_heads,
            self.ffn_layer,
            self.ffn_hidden,
            self.qkv_bias,
            intermediates,
            self.dtype,
            name="blocks",
        )


def dense(features: int, dtype: Dtype, name: str, use_bias: bool = True) -> layers.Dense:
    """Linear layer with DINOv3's initialisation: normal with deviation 0.02, zero bias."""
    return layers.Dense(
        features, use_bias=use_bias, dtype=dtype, kernel_init=normal_init(0.02), name=name
    )
