"""The vision transformer of every encoder: DINOv3, EUPE, DINOv2, SigLIP2 and MAE.

They share their blocks. What differs is data: the prefix tokens, the kind of positions, the norms,
which layers are read (`dinosae_jax.encoders` has the values of each family). The defaults mirror
DinoVisionTransformer of facebookresearch/dinov3 in evaluation mode. The key part of the qkv bias is
masked to zero there (`mask_k_bias`); here it is zeroed when a checkpoint is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax import names
from dinosae_jax.models import attention, layers, positions, resize, rope
from dinosae_jax.models.layers import layer_norm, normal_init
from dinosae_jax.models.stem import PatchStem

Array = jax.Array


class ViTOutput(NamedTuple):
    """What the transformer returns; arrays are float32.

    cls: [b, d] class token after the final norm; of an encoder without one the mean patch token.
    storage: [b, s, d] storage tokens after the final norm.
    patches: [b, n, d] patch tokens after the final norm.
    prenorm: [b, 1+s+n, d] all tokens before the final norm.
    intermediates: None, or a dictionary of tokens_in [b, 1+s+n, d], rope_sin and rope_cos
      [n, head width] (of rotary positions), after_attn and out [depth, b, 1+s+n, d].
    """

    cls: Array
    storage: Array
    patches: Array
    prenorm: Array
    intermediates: dict[str, Array] | None


class Attention(nn.Module):
    """Self-attention over all tokens, with rotary positions where there is a table of them.

    [b, n, d] -> [b, n, d] in `dtype`; rotation and softmax in float32.
    """

    num_heads: int
    qkv_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, rotation: attention.Rotation | None) -> Array:
        d = x.shape[-1]
        qkv = dense(3 * d, self.dtype, "qkv", use_bias=self.qkv_bias)(x)
        return dense(d, self.dtype, "proj")(attention.attention(qkv, self.num_heads, rotation))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them. [b, n, d] -> [b, n, d] in `dtype`."""

    hidden: int
    dtype: Dtype
    approximate: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = dense(self.hidden, self.dtype, "fc1")(x)
        y = jax.nn.gelu(hidden) if self.approximate else layers.gelu(hidden)
        y = layers.materialised(y)
        return dense(x.shape[-1], self.dtype, "fc2")(y)


class SwiGlu(nn.Module):
    """Gated feed-forward w3(silu(w1 x) * w2 x). [b, n, d] -> [b, n, d] in `dtype`.

    `fused` has w1 and w2 in one layer `w12`, as DINOv2 stores them.
    """

    hidden: int
    dtype: Dtype
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.fused:
            gate, value = jnp.split(dense(2 * self.hidden, self.dtype, "w12")(x), 2, axis=-1)
        else:
            gate = dense(self.hidden, self.dtype, "w1")(x)
            value = dense(self.hidden, self.dtype, "w2")(x)
        return dense(x.shape[-1], self.dtype, "w3")(jax.nn.silu(gate) * value)


FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "mlp_tanh": functools.partial(Mlp, approximate=True),
    "swiglu": SwiGlu,
    "swiglu_fused": functools.partial(SwiGlu, fused=True),
}


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
    layer_scale: bool = True
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Array, rotation: attention.Rotation | None
    ) -> tuple[Array, dict[str, Array] | None]:
        mix = Attention(self.num_heads, self.qkv_bias, self.dtype, name="attn")
        y = mix(layer_norm("norm1", self.norm_eps)(x), rotation)
        after_attn = x + self._scaled(y, "ls1")
        y = FFN_LAYERS[self.ffn_layer](self.ffn_hidden, self.dtype, name="mlp")(
            layer_norm("norm2", self.norm_eps)(after_attn)
        )
        x = after_attn + self._scaled(y, "ls2")
        return x, {"after_attn": after_attn, "out": x} if self.intermediates else None

    def _scaled(self, y: Array, name: str) -> Array:
        return LayerScale(name=name)(y) if self.layer_scale else y.astype(jnp.float32)


class RopeEmbed(nn.Module):
    """Holds the periods, as a checkpoint may override them; they are never trained."""

    head_dim: int

    @nn.compact
    def __call__(self, height: int, width: int) -> tuple[Array, Array]:
        periods = self.param("periods", lambda _: rope.default_periods(self.head_dim))
        return rope.rope_table(jax.lax.stop_gradient(periods), height, width)


class VisionTransformer(nn.Module):
    """An encoder from a grid of patch tokens to normed tokens.

    `embed_patches` is the teacher's way from images to such a grid, a `ConvStem` the student's;
    both feed `__call__`. The parameters of the patch embedding exist either way.

    Attributes:
      embed_dim: width d.
      depth: number of blocks; those up to the last of `layers` are stacked under `blocks`.
      num_heads: attention heads.
      ffn_hidden: hidden width of the feed-forward layer, as used.
      ffn_layer: "mlp" (exact GELU), "mlp_tanh" (its approximation), "swiglu" or
        "swiglu_fused" (the same with two of its matrices stored as one).
      qkv_bias: whether q, k and v have a bias.
      num_storage_tokens: storage (register) tokens between class token and patches.
      patch_size: side of a patch in pixels.
      scan_layers: whether the blocks are a loop in the compiled program, or unrolled.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
      dtype: of matrix products and convolutions; everything else is float32.
      class_token: whether there is one.
      class_position: whether the stored table has a row for it.
      positions: "rope", or a stored table that is added to class token and patches: "learned",
        or "sincos", which differs in how it is drawn.
      table_side: side of the grid of the stored table; 0 with "rope".
      table_resize: how the table is brought to another grid, see `resize.resize_table`.
      layer_scale: whether the blocks have LayerScale.
      norm_eps: of all layer norms.
      final_norm: "affine", or "plain" for no scale and bias (the weights may hold them).
      final_norm_eps: of the final norm; 0 for `norm_eps`.
      layers: the blocks, counted from 0, whose outputs are read, each through the final norm; the
        mean of several; () for the last. What lies above is not computed.
      layer_sum: whether several are summed instead.
      token_mean: whether the mean patch token of the last of `layers` is added to each patch.
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
    class_token: bool = True
    class_position: bool = True
    positions: names.Positions = "rope"
    table_side: int = 0
    table_resize: names.TableResize = "bicubic_antialias"
    layer_scale: bool = True
    norm_eps: float = 1e-5
    final_norm: str = "affine"
    final_norm_eps: float = 0.0
    layers: tuple[int, ...] = ()
    layer_sum: bool = False
    token_mean: bool = False

    def setup(self) -> None:
        self._check()
        normal, zeros = normal_init(0.02), nn.initializers.zeros
        d, s = self.embed_dim, self.num_storage_tokens
        self.patch_embed = PatchStem(d, self.patch_size, self.dtype)
        if self.positions == "rope":
            self.rope_embed = RopeEmbed(d // self.num_heads)
        else:
            rows = self._class_rows + self.table_side**2
            self.pos_embed = self.param("pos_embed", self._draw_table, (1, rows, d))
        cls_shape = (1, int(self.class_token), d)
        self.cls_token = self.param("cls_token", normal, cls_shape, jnp.float32)
        self.storage_tokens = self.param("storage_tokens", normal, (1, s, d), jnp.float32)
        self.mask_token = self.param("mask_token", zeros, (1, d), jnp.float32)
        self.norm = layer_norm(
            epsilon=self.final_norm_eps or self.norm_eps, affine=self.final_norm == "affine"
        )

    def _check(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads; got {self.embed_dim} and "
                f"{self.num_heads}; change one of them"
            )
        if self.ffn_layer not in FFN_LAYERS:
            raise ValueError(
                f"ffn_layer is one of {', '.join(FFN_LAYERS)}; got {self.ffn_layer!r}; choose one "
                "of them"
            )
        if (self.positions == "rope") != (self.table_side == 0):
            raise ValueError(
                "a table of positions has the side of its grid, and rotary positions have none; "
                f"got positions={self.positions!r} and table_side={self.table_side}; change one"
            )
        increasing = list(self.layers) == sorted(set(self.layers))
        if not increasing or any(not 0 <= layer < self.depth for layer in self.layers):
            raise ValueError(
                f"layers are increasing block numbers from 0 to depth - 1 = {self.depth - 1}; got "
                f"{tuple(self.layers)}; name blocks that this size has"
            )

    def _draw_table(self, key: Array, shape: tuple[int, ...]) -> Array:
        if self.positions == "learned":
            return normal_init(0.02)(key, shape)
        table = jnp.asarray(positions.sincos_table(self.table_side, self.embed_dim))[None]
        return jnp.pad(table, ((0, 0), (self._class_rows, 0), (0, 0)))

    def embed_patches(self, images: Array) -> Array:
        """Patch grid of normalised images by the encoder's own convolution.

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
        cls_token, rotation = self.cls_token, None
        if self.positions != "rope":
            at_cls, at_patches = self.position_table(h, w)
            cls_token = cls_token + at_cls if at_cls.size else cls_token
            tokens = tokens + at_patches
        prefix = jnp.concatenate([cls_token, self.storage_tokens], axis=1)
        count = prefix.shape[1]
        tokens = jnp.concatenate([jnp.broadcast_to(prefix, (b, count, d)), tokens], axis=1)
        if self.positions == "rope":
            sin, cos = self.rope_embed(h, w)
            all_sin, all_cos = rope.prepend_identity((sin, cos), count)
            rotation = attention.Rotation(all_cos, all_sin, distance=sin.shape[1] // 2)
        prenorm, normed, states = self._run(tokens, rotation, intermediates)
        if states is not None:
            states = {"tokens_in": tokens, **states}
            if self.positions == "rope":
                states |= {"rope_sin": sin, "rope_cos": cos}
        found = normed[:, count:]
        if self.token_mean:
            last = normed if len(self.layers) < 2 else self.norm(prenorm)
            found = found + jnp.mean(last[:, count:], axis=1, keepdims=True)
        cls = normed[:, 0] if self.class_token else jnp.mean(found, axis=1)
        return ViTOutput(cls, normed[:, int(self.class_token) : count], found, prenorm, states)

    def position_table(self, height: int, width: int) -> tuple[Array, Array]:
        """The stored positions on a grid: of the class token [1, c, d], of the patches [1, n, d].

        c is 1, or 0 where the table has no row for a class token.
        """
        count, side = self._class_rows, self.table_side
        table = self.pos_embed[0, count:].reshape(side, side, self.embed_dim)
        grid = resize.resize_table(table, (height, width), self.table_resize)
        return self.pos_embed[:, :count], grid.reshape(1, height * width, self.embed_dim)

    def _run(
        self, tokens: Array, rotation: attention.Rotation | None, intermediates: bool
    ) -> tuple[Array, Array, dict[str, Array] | None]:
        """Tokens before and after the final norm, and what is inside the blocks.

        Several layers are added up while the blocks run, each through the norm without its affine
        part, which is applied to the sum.
        """
        if len(self.layers) < 2:
            prenorm, states = self._make_blocks(intermediates)(tokens, rotation)
            return prenorm, self.norm(prenorm), states
        rematerialised = layers.rematerialised(Block, self.remat, not self.scan_layers)
        blocks = rematerialised(**self._block(intermediates), name="blocks")
        norm = layer_norm(epsilon=self.norm.epsilon, affine=False, parent=None)

        def add(block: Block, carry: tuple[Array, Array], read: Array, rotation: Any):
            tokens, states = block(carry[0], rotation)
            plain: Any = norm.apply({}, tokens)
            return (tokens, carry[1] + read * plain), states

        each = 1.0 if self.layer_sum else 1 / len(self.layers)
        read = jnp.array([each * (i in self.layers) for i in range(self.run_depth)])
        scan = self._scan(add, (0, nn.broadcast))
        (prenorm, total), states = scan(blocks, (tokens, jnp.zeros_like(tokens)), read, rotation)
        if self.is_initializing():
            self.norm(prenorm)
        affine = self.norm.variables.get("params", {}) if self.final_norm == "affine" else {}
        bias = affine.get("bias", 0.0) * (len(self.layers) if self.layer_sum else 1)
        return prenorm, total * affine.get("scale", 1.0) + bias, states

    @property
    def _class_rows(self) -> int:
        return int(self.class_token and self.class_position)

    @property
    def run_depth(self) -> int:
        """Blocks that are computed: up to the last of `layers`."""
        return self.layers[-1] + 1 if self.layers else self.depth

    def _make_blocks(self, intermediates: bool) -> nn.Module:
        """The stack of blocks: one scanned module, whatever the unrolling and rematerialisation."""
        block = layers.rematerialised(Block, self.remat, prevent_cse=not self.scan_layers)
        return self._scan(block, nn.broadcast)(**self._block(intermediates), name="blocks")

    def _block(self, intermediates: bool) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "ffn_layer": self.ffn_layer,
            "ffn_hidden": self.ffn_hidden,
            "qkv_bias": self.qkv_bias,
            "intermediates": intermediates,
            "dtype": self.dtype,
            "layer_scale": self.layer_scale,
            "norm_eps": self.norm_eps,
        }

    def _scan(self, target: Any, in_axes: Any) -> Any:
        return nn.scan(
            target,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=self.run_depth,
            unroll=1 if self.scan_layers else self.run_depth,
        )


def dense(features: int, dtype: Dtype, name: str, use_bias: bool = True) -> layers.Dense:
    """Linear layer with DINOv3's initialisation: normal with deviation 0.02, zero bias."""
    return layers.Dense(
        features, use_bias=use_bias, dtype=dtype, kernel_init=normal_init(0.02), name=name
    )
