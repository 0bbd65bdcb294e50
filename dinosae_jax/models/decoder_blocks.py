"""Blocks of the DC-AE decoder: residual blocks, EfficientViT blocks, upsampling and shortcuts.

Mirrors the vendored efficientvit package of DINO-SAE. Convolutions have stride 1 and zero padding
of half the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax.models.layers import ACTIVATIONS, Conv2d, ConvLayer, in_blocks

Array = jax.Array
Factory = Callable[..., nn.Module]

HEAD_DIM = 32  # of linear attention, in every published configuration
EXPAND_RATIO = 4  # of the gated convolution


def upsample_nearest(x: Array) -> Array:
    """Repeats each pixel twice along height and width. [b, h, w, c] -> [b, 2h, 2w, c]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def linear_attention(qkv: Array) -> Array:
    """Attention with the kernel relu(q)·relu(k) in place of the softmax, linear in the pixels.

    out_n = sum_m v_m (k_m·q_n) / (sum_m k_m·q_n + 1e-15). DC-AE computes the same with another
    order of the products on at most 32 pixels.

    Args:
      qkv: [b, n, k, 3*d] float32; q, k and v of each head are adjacent.

    Returns:
      [b, n, k, d] float32.
    """
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    memory = einsum("bnkd,bnke->bkde", k, v)
    weight = einsum("bnkd,bkd->bnk", q, jnp.sum(k, axis=1))
    return einsum("bnkd,bkde->bnke", q, memory) / (weight[..., None] + 1e-15)


def shuffle_blocks(x: Array, factor: int) -> Array:
    """Turns blocks of channels into space: channel (i*f + j)*c + k goes to pixel (i, j) of a cell.

    PyTorch's pixel shuffle has channel k*f*f + i*f + j there. Blocks move as whole vectors of c
    channels, which no other order does.

    [b, h, w, f*f*c] -> [b, h*f, w*f, c].
    """
    b, h, w, channels = x.shape
    c = channels // factor**2
    x = x.reshape(b, h, w, factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * factor, w * factor, c)


class Duplicate(nn.Module):
    """Shortcut without parameters: repeats each channel, then shuffles pixels.

    [b, h, w, c] -> [b, h*factor, w*factor, features].
    """

    features: int
    factor: int

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Applies the shortcut; `train` is ignored."""
        return shuffle_blocks(self.blocks(x), self.factor)

    def blocks(self, x: Array) -> Array:
        """The repeated channels as `shuffle_blocks` takes them, [b, h, w, factor^2 * features].

        Each output channel takes its factor^2 pixels from one input channel, or from several in
        turn. Channels are only cut and laid side by side, so that the gradient has no sums over
        neighbouring channels.
        """
        lead, channels, cells = x.shape[:-1], x.shape[-1], self.factor**2
        times = cells * self.features // channels
        if times * channels != cells * self.features:
            raise ValueError(
                "the input channels of a duplicating shortcut divide features * factor^2; got "
                f"{channels} and {cells * self.features}; change width_list or latent_channels, or "
                "set the shortcut to None"
            )
        if times % cells == 0:  # an input channel fills all pixels of one or more output channels
            wide = jnp.repeat(x, times // cells, axis=-1)
            return jnp.concatenate([wide] * cells, axis=-1)
        if cells % times == 0:  # several input channels share the pixels of one output channel
            shares = jnp.moveaxis(x.reshape(*lead, self.features, cells // times), -1, 0)
            return jnp.concatenate([share for share in shares for _ in range(times)], axis=-1)
        return in_blocks(jnp.repeat(x, times, axis=-1), cells)


class Residual(nn.Module):
    """main(x) + shortcut(x), added in float32 and rounded to the type of main(x).

    Attributes:
      main: makes the main module, called as main(name="main").
      shortcut: makes the shortcut, called as shortcut(name="shortcut"); None is the identity.
    """

    main: Factory
    shortcut: Factory | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        skip = x if self.shortcut is None else self.shortcut(name="shortcut")(x, train)
        return _added(self.main(name="main")(x, train), skip)


def _added(main: Array, skip: Array) -> Array:
    """The sum of both, like the first."""
    return (main.astype(jnp.float32) + skip.astype(jnp.float32)).astype(main.dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, with bias and activation, then with norm: [b, h, w, c] -> the same."""

    norm: str | None
    act: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c = x.shape[-1]
        x = ConvLayer(c, act=self.act, dtype=self.dtype, name="conv1")(x)
        conv2 = ConvLayer(c, use_bias=False, norm=self.norm, dtype=self.dtype, name="conv2")
        return conv2(x, train)


class LiteMLA(nn.Module):
    """Multi-scale linear attention between two 1x1 convolutions. [b, h, w, c] -> same shape.

    Attributes:
      scales: kernel sizes; each adds as many heads, aggregated over that neighbourhood.
      norm: after the second convolution.
      dtype: of the convolutions; attention is float32.
    """

    scales: tuple[int, ...]
    norm: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        b, h, w, c = x.shape
        heads = c // HEAD_DIM
        width = 3 * heads * HEAD_DIM
        pointwise = functools.partial(ConvLayer, kernel_size=1, use_bias=False, dtype=self.dtype)
        conv = functools.partial(Conv2d, width, use_bias=False, dtype=self.dtype)
        qkv = pointwise(width, name="qkv")(x)
        groups = [qkv]
        for i, scale in enumerate(self.scales):
            near = conv(kernel_size=scale, groups=width, name=f"aggreg_{i}_0")(qkv)
            groups.append(conv(kernel_size=1, groups=3 * heads, name=f"aggreg_{i}_1")(near))
        all_heads = jnp.concatenate(groups, axis=-1).astype(jnp.float32)
        y = linear_attention(all_heads.reshape(b, h * w, -1, 3 * HEAD_DIM))
        return pointwise(c, norm=self.norm, name="proj")(y.reshape(b, h, w, -1), train)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: 1x1, depthwise 3x3, gate, 1x1. [b, h, w, c] -> same shape."""

    norm: str | None
    act: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c = x.shape[-1]
        width = 2 * EXPAND_RATIO * c
        conv = functools.partial(ConvLayer, dtype=self.dtype)
        y = conv(width, kernel_size=1, act=self.act, name="inverted_conv")(x)
        y = conv(width, groups=width, name="depth_conv")(y)
        value, gate = jnp.split(y, 2, axis=-1)
        y = value * ACTIVATIONS[self.act](gate)
        return conv(c, kernel_size=1, use_bias=False, norm=self.norm, name="point_conv")(y, train)


class EViTBlock(nn.Module):
    """EfficientViT block: linear attention, then the gated convolution, each with a residual.

    DINO-SAE's builder drops the norm of these blocks where it is "trms2d" (it hands a module to
    a function that looks for a string), and its checkpoints have no parameters for it: so here.

    [b, h, w, c] -> [b, h, w, c] in `dtype`.
    """

    scales: tuple[int, ...]
    norm: str | None
    act: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = None if self.norm == "trms2d" else self.norm
        attention = functools.partial(LiteMLA, self.scales, norm, self.dtype)
        convolution = functools.partial(GLUMBConv, norm, self.act, self.dtype)
        x = Residual(attention, name="context_module")(x, train)
        return Residual(convolution, name="local_module")(x, train)


class ConvPixelShuffle(nn.Module):
    """3x3 convolution to four times the channels, then a pixel shuffle: [b, 2h, 2w, features].

    The kernel is stored in the order of PyTorch's pixel shuffle.
    """

    features: int
    dtype: Dtype

    def __call__(self, x: Array, train: bool = False) -> Array:
        return shuffle_blocks(self.blocks(x), 2)

    @nn.compact
    def blocks(self, x: Array) -> Array:
        """What `shuffle_blocks` takes, [b, h, w, 4*features] in `dtype`."""
        return ConvLayer(4 * self.features, dtype=self.dtype, blocks=4, name="conv")(x)


class ShuffledResidual(nn.Module):
    """`Residual` of a `ConvPixelShuffle` and a `Duplicate`, whose sum is shuffled once.

    [b, h, w, c] -> [b, 2h, 2w, features] in `dtype`.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        main = ConvPixelShuffle(self.features, self.dtype, name="main").blocks(x)
        skip = Duplicate(self.features, 2, name="shortcut").blocks(x)
        return shuffle_blocks(_added(main, skip), 2)


class InterpolateConv(nn.Module):
    """Nearest neighbour upsampling, then a 3x3 convolution: [b, 2h, 2w, features]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return ConvLayer(self.features, dtype=self.dtype, name="conv")(upsample_nearest(x))


UPSAMPLERS = {"ConvPixelShuffle": ConvPixelShuffle, "InterpolateConv": InterpolateConv}
EVIT_SCALES: dict[str, tuple[int, ...]] = {"EViT_GLU": (), "EViTS5_GLU": (5,)}
