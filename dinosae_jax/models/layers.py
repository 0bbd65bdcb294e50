"""Convolutions, norms and activations of the stem and the decoder.

Everything is NHWC. Parameters are float32; convolutions run in `dtype`, norms in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

Array = jax.Array

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def uniform_init(bound: float) -> nn.initializers.Initializer:
    """Initializer that draws from U(-bound, bound)."""
    return _reshaped(functools.partial(jax.random.uniform, minval=-bound, maxval=bound))


def normal_init(deviation: float) -> nn.initializers.Initializer:
    """Initializer that draws from N(0, deviation^2)."""
    return _reshaped(nn.initializers.normal(deviation))


def _reshaped(draw: Callable[..., Array]) -> nn.initializers.Initializer:
    """Draws a vector and reshapes it, which XLA compiles several times faster than an array."""

    def init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
        return draw(key, (math.prod(shape),), dtype).reshape(shape)

    return init


class Conv2d(nn.Module):
    """Convolution with explicit symmetric zero padding and PyTorch's default initialisation.

    "SAME" would pad unevenly at stride 2 and shift the output by a pixel, so `padding` pixels
    (None: half the kernel) are added on all four sides. Kernel and bias are drawn from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = kernel_size^2 * channels / groups.

    [b, h, w, c] -> [b, h', w', features] in `dtype`, h' = floor((h + 2 padding - kernel) / stride)
    + 1.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, channels = self.kernel_size, x.shape[-1] // self.groups
        pad = size // 2 if self.padding is None else self.padding
        init = uniform_init((size * size * channels) ** -0.5)
        kernel = self.param("kernel", init, (size, size, channels, self.features), jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        if not self.use_bias:
            return y
        bias = self.param("bias", init, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)


class ImageRMSNorm(nn.Module):
    """RMS norm with one statistic per image, over height, width and channels ("trms2d").

    y = scale * x / sqrt(mean_{h,w,c}(x^2) + 1e-6). Mirrors RMSNorm2d of DINO-SAE's src/model.py.
    The result depends on the image size, and needs a reduction over spatial shards.

    [b, h, w, c] any float -> [b, h, w, c] float32.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=(1, 2, 3), keepdims=True)
        return scale * (x * jax.lax.rsqrt(mean_square + 1e-6))


class PixelRMSNorm(nn.Module):
    """RMS norm over the channels of each pixel, with bias ("pixel_trms2d").

    y = scale * x / sqrt(mean_c(x^2) + 1e-5) + bias. This is what efficientvit's DC-AE means by
    "trms2d" (TritonRMSNorm2d); DINO-SAE gives the same string another meaning, `ImageRMSNorm`.

    [b, h, w, c] any float -> [b, h, w, c] float32.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-5) * scale + bias


class BatchNorm(nn.Module):
    """Batch norm with PyTorch's running statistics ("bn2d"): eps 1e-5, momentum 0.1.

    In training it normalises with the biased variance of the batch (of the global batch, under
    jit with a sharded batch) and moves the running variance towards the unbiased one; Flax's own
    layer would keep the biased one. Collection `batch_stats`: running_mean and running_var, [c].

    [b, h, w, c] any float -> [b, h, w, c] float32.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "running_mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "running_var", jnp.ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
            if not self.is_initializing():
                count = x.shape[0] * x.shape[1] * x.shape[2]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_var.value = 0.9 * running_var.value + 0.1 * unbiased
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def layer_norm(
    name: str | None = None, epsilon: float = 1e-5, affine: bool = True, **others: Any
) -> nn.LayerNorm:
    """Layer norm over the last axis in float32, variance in two passes."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        name=name,
        **others,
    )


def apply_norm(kind: str | None, x: Array, train: bool, name: str) -> Array:
    """Normalises x [b, h, w, c] with a submodule `name` of the calling compact module.

    Args:
      kind: "trms2d", "pixel_trms2d", "bn2d", "ln2d" or None (x is returned as it is).
      x: the features.
      train: whether batch norm uses and updates the statistics of the batch.
      name: the submodule's name.

    Returns:
      [b, h, w, c] float32, or x for None.
    """
    if kind is None:
        return x
    if kind == "bn2d":
        return BatchNorm(name=name)(x, train)
    norms: dict[str, Callable[..., nn.Module]] = {
        "trms2d": ImageRMSNorm,
        "pixel_trms2d": PixelRMSNorm,
        "ln2d": layer_norm,
    }
    return norms[kind](name=name)(x)


class ConvLayer(nn.Module):
    """Convolution -> norm (if any) -> activation (if any).

    [b, h, w, c] -> [b, h', w', features]; float32 after a norm, else `dtype`.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    norm: str | None = None
    act: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv2d(
            self.features,
            self.kernel_size,
            self.stride,
            groups=self.groups,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        return ACTIVATIONS[self.act](apply_norm(self.norm, x, train, name="norm"))


def rematerialised(block: type[nn.Module], remat: str, prevent_cse: bool) -> type[nn.Module]:
    """The block class with the given recomputation in its backward pass.

    Args:
      block: a module class.
      remat: "none", "dots" (keep matrix products without batch dimension) or "full".
      prevent_cse: needed outside a loop, where the compiler would undo the recomputation.

    Returns:
      The class to build the blocks from.

    Raises:
      ValueError: for another value of `remat`.
    """
    policies: dict[str, Any] = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": None,
    }
    if remat == "none":
        return block
    if remat not in policies:
        raise ValueError(f"remat is 'none', 'dots' or 'full'; got {remat!r}; choose one of them")
    return nn.remat(block, policy=policies[remat], prevent_cse=prevent_cse)
