"""Parts shared by LightningDiT and DiT^DH: embedders, the adaLN block, its stack, the output layer.

Precision: the residual stream, norms, softmax, rotary embedding, time embedding, modulation and
output layer are float32; the matrix products of a block run in `dtype`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax.models import attention, layers
from dinosae_jax.runtime import fsdp

Initialisation = Literal["xavier", "torch"]

_FREQUENCIES = 256  # of RAE's Gaussian Fourier basis; the original has half as many, fixed
_normal = nn.initializers.normal(0.02)


def _flat_xavier(key, shape, dtype=jnp.float32):
    """Xavier uniform of a kernel seen as a matrix (everything but the last axis, last axis)."""
    bound = (6.0 / (math.prod(shape[:-1]) + shape[-1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _torch_uniform(fan_in: int):
    """torch.nn.Linear's default for weight and bias alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""

    def draw(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def dense(
    features: int, fan_in: int, initialisation: Initialisation, dtype: Any, name: str
) -> layers.Dense:
    """A linear layer with the original's initialisation ('xavier') or DiT^DH's ('torch')."""
    if initialisation == "xavier":
        return layers.Dense(features, dtype=dtype, kernel_init=_flat_xavier, name=name)
    uniform = _torch_uniform(fan_in)
    return layers.Dense(features, dtype=dtype, kernel_init=uniform, bias_init=uniform, name=name)


def _zero_dense(features: int, dtype: Any, precision: Any, name: str) -> layers.Dense:
    zeros = nn.initializers.zeros
    return layers.Dense(features, dtype=dtype, precision=precision, kernel_init=zeros, name=name)


def _norm(use_rmsnorm: bool, name: str) -> nn.Module:
    """A norm over the width in float32: RMSNorm with a scale, or LayerNorm without parameters."""
    if use_rmsnorm:
        return nn.RMSNorm(1e-6, dtype=jnp.float32, name=name)
    return nn.LayerNorm(
        1e-6, jnp.float32, use_bias=False, use_scale=False, use_fast_variance=False, name=name
    )


def _head_norm(use_rmsnorm: bool, name: str) -> nn.Module:
    """A norm of queries and keys; the LayerNorm is affine here, with torch's default eps 1e-5."""
    if use_rmsnorm:
        return nn.RMSNorm(1e-6, dtype=jnp.float32, name=name)
    return nn.LayerNorm(1e-5, jnp.float32, use_fast_variance=False, name=name)


class PatchEmbed(nn.Module):
    """Embedding of a grid's patches: [b, h, w, c] -> tokens [b, n, d] float32, row-major."""

    hidden_size: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        project = layers.PatchProjection(
            self.hidden_size, self.patch_size, self.dtype, _flat_xavier, name="proj"
        )
        return project(x).reshape(x.shape[0], -1, self.hidden_size).astype(jnp.float32)


class TimestepEmbedder(nn.Module):
    """Embedding of the time: [b] in [0, 1] -> [b, d], all in float32.

    'sinusoidal' (original): cos then sin of t * 10000^(-i/128), i < 128, t not multiplied by 1000.
    'fourier' (RAE): sin then cos of 2 pi t W, W ~ N(0, 1) of 256 entries, a leaf of the parameters.
    """

    hidden_size: int
    time_embedding: Literal["sinusoidal", "fourier"]
    initialisation: Initialisation

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        t = t.astype(jnp.float32)[:, None]
        if self.time_embedding == "fourier":
            basis = self.param("W", nn.initializers.normal(1.0), (_FREQUENCIES,))
            phase = t * basis * 2.0 * jnp.pi
            features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        else:
            half = _FREQUENCIES // 2
            phase = t * jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
            features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
        hidden = nn.silu(self._linear(features.shape[-1], "mlp_0")(features))
        return self._linear(self.hidden_size, "mlp_2")(hidden)

    def _linear(self, fan_in: int, name: str) -> layers.Dense:
        bias = nn.initializers.zeros if self.initialisation == "xavier" else _torch_uniform(fan_in)
        # Neighbouring times differ in the last bits of these features: never round them to bf16.
        exact = jax.lax.Precision.HIGHEST
        return layers.Dense(
            self.hidden_size, precision=exact, kernel_init=_normal, bias_init=bias, name=name
        )


class LabelEmbedder(nn.Module):
    """Embedding of labels: [b] int32 -> [b, d] float32; a label beyond the table gives NaN."""

    num_rows: int
    hidden_size: int

    @nn.compact
    def __call__(self, labels: jax.Array) -> jax.Array:
        table = nn.Embed(
            self.num_rows, self.hidden_size, embedding_init=_normal, name="embedding_table"
        )
        return table(labels)


class Attention(nn.Module):
    """Self-attention over tokens with fused qkv, optional query/key norm, then optional RoPE."""

    num_heads: int
    use_qknorm: bool
    use_rmsnorm: bool
    initialisation: Initialisation
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, rope: attention.Rotation | None) -> jax.Array:
        d = x.shape[-1]
        qkv = dense(3 * d, d, self.initialisation, self.dtype, "qkv")(x)
        if self.use_qknorm:
            qkv = self._normed(qkv)
        out = attention.attention(qkv, self.num_heads, rope)
        return dense(d, d, self.initialisation, self.dtype, "proj")(out)

    def _normed(self, qkv: jax.Array) -> jax.Array:
        """The fused projection with the queries and keys of every head normed."""
        q, k, v = jnp.split(qkv, 3, axis=-1)
        heads = (*q.shape[:2], self.num_heads, -1)
        q = _head_norm(self.use_rmsnorm, "q_norm")(q.reshape(heads)).reshape(q.shape)
        k = _head_norm(self.use_rmsnorm, "k_norm")(k.reshape(heads)).reshape(k.shape)
        return jnp.concatenate([q.astype(v.dtype), k.astype(v.dtype), v], axis=-1)


class SwiGLU(nn.Module):
    """silu(first half) * second half of one fused projection, projected back."""

    hidden: int
    initialisation: Initialisation
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        gate, up = jnp.split(
            dense(2 * self.hidden, d, self.initialisation, self.dtype, "w12")(x), 2, -1
        )
        return dense(d, self.hidden, self.initialisation, self.dtype, "w3")(nn.silu(gate) * up)


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU between them."""

    hidden: int
    initialisation: Initialisation
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        hidden = nn.gelu(
            dense(self.hidden, d, self.initialisation, self.dtype, "fc1")(x), approximate=True
        )
        return dense(d, self.hidden, self.initialisation, self.dtype, "fc2")(hidden)


def mlp_hidden(hidden_size: int, mlp_ratio: float, use_swiglu: bool) -> int:
    """Hidden width of a block's MLP: int(2/3 * int(ratio * d)) for SwiGLU, else int(ratio * d)."""
    hidden = int(hidden_size * mlp_ratio)
    return int(2 / 3 * hidden) if use_swiglu else hidden


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1.0 + scale) + shift


class Block(nn.Module):
    """One adaLN transformer block.

    Called with tokens [b, n, d] float32, conditioning [b, 1 or n, d] float32 and the RoPE tables;
    returns the new tokens and, with `record`, the branch and block outputs under '', 'attn', 'mlp'.
    """

    num_heads: int
    mlp_ratio: float
    use_qknorm: bool
    use_swiglu: bool
    use_rmsnorm: bool
    wo_shift: bool
    initialisation: Initialisation
    dtype: Any
    record: bool

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, rope: attention.Rotation | None):
        x, c = fsdp.shard_by_example(x), fsdp.shard_by_example(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c)
        attention = Attention(
            self.num_heads,
            self.use_qknorm,
            self.use_rmsnorm,
            self.initialisation,
            self.dtype,
            name="attn",
        )
        hidden = mlp_hidden(x.shape[-1], self.mlp_ratio, self.use_swiglu)
        mlp = (SwiGLU if self.use_swiglu else Mlp)(
            hidden, self.initialisation, self.dtype, name="mlp"
        )

        a = attention(self._normed("norm1", x, shift1, scale1), rope)
        x = x + gate1 * a.astype(jnp.float32)
        m = layers.materialised(mlp(self._normed("norm2", x, shift2, scale2)))
        x = x + gate2 * m.astype(jnp.float32)
        return x, {"": x, "attn": a, "mlp": m} if self.record else None

    def _normed(self, name: str, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        """Input of a branch, in `dtype`; its gradient is written to memory before the norm's."""
        y = _modulate(_norm(self.use_rmsnorm, name)(x), shift, scale)
        return layers.materialised(y.astype(self.dtype))

    def _modulation(self, c: jax.Array) -> list[jax.Array]:
        """Shift, scale, gate of both branches; shifts are 0 without them."""
        # One vector per sample costs nothing in float32; one per token is a real matrix product.
        dtype, precision = (jnp.float32, "highest") if c.shape[1] == 1 else (self.dtype, None)
        chunks = 4 if self.wo_shift else 6
        linear = _zero_dense(chunks * c.shape[-1], dtype, precision, "adaLN_modulation_1")
        m = linear(nn.silu(c))
        parts = [part.astype(jnp.float32) for part in jnp.split(m, chunks, axis=-1)]
        zero = jnp.zeros(())
        return [zero, *parts[:2], zero, *parts[2:]] if self.wo_shift else parts


def block_stack(
    depth: int, scan_layers: bool, remat: str, name: str, **block: Any
) -> Callable[[jax.Array, jax.Array, attention.Rotation | None], tuple[jax.Array, Any]]:
    """A stack of `depth` equal blocks; their parameters have a leading depth axis under `name`.

    Args:
      depth: number of blocks.
      scan_layers: one compiled body in a loop; False unrolls it (same parameters, same result).
      remat: what the backward pass recomputes: 'none', 'dots' (all but products with weights), or
        'full' (everything inside a block).
      name: key of the stacked parameters.
      **block: attributes of `Block`.

    Returns:
      A bound module (tokens, conditioning, rope) -> (tokens, records with a leading depth axis).

    Raises:
      ValueError: an unknown remat.
    """
    # Whole weights are gathered inside the rematerialised region, so that they are never kept.
    gather = functools.partial(fsdp.gather_block, depth=depth)
    body: Any = nn.map_variables(Block, "params", gather, init=True)
    body = layers.rematerialised(body, remat, prevent_cse=not scan_layers)
    stack = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=depth,
        unroll=1 if scan_layers else depth,
    )
    return stack(name=name, **block)


class FinalLayer(nn.Module):
    """Norm, adaLN shift and scale, zero-initialised projection; float32 throughout."""

    features: int
    use_rmsnorm: bool
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        dense = functools.partial(_zero_dense, dtype=jnp.float32, precision=self.precision)
        m = dense(2 * x.shape[-1], name="adaLN_modulation_1")(nn.silu(c))
        shift, scale = jnp.split(m, 2, axis=-1)
        x = _modulate(_norm(self.use_rmsnorm, "norm_final")(x), shift, scale)
        return dense(self.features, name="linear")(x)


def as_grid(x: jax.Array, side: int, channels: int) -> jax.Array:
    """Views [b, h, w, c] or row-major [b, h * w, c] as a grid [b, side, side, channels].

    Raises:
      ValueError: any other shape.
    """
    grid, tokens = (side, side, channels), (side * side, channels)
    if x.shape[1:] not in (grid, tokens):
        raise ValueError(
            f"x must be [b, {side}, {side}, {channels}] or [b, {side * side}, {channels}]; "
            f"got {list(x.shape)}; change input_size or in_channels"
        )
    return x.reshape(-1, *grid)


def name_blocks(records: dict[str, jax.Array], first: int) -> dict[str, jax.Array]:
    """Unstacks block records into the reference's module names `blocks.<i>[.attn|.mlp]`."""
    return {
        f"blocks.{first + i}{'.' if part else ''}{part}": value[i]
        for part, value in records.items()
        for i in range(value.shape[0])
    }


def check_widths(hidden_size: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads; got {hidden_size} and {num_heads}; "
            "change one of them"
        )
