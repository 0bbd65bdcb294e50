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
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
_SUBLANES = 8  # rows of a TPU's register
PRODUCT = "product"  # name of what the remat policy 'dots' keeps: products with weights, attention

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x: Array, kernel: Array, bias: Array | None, precision: Any) -> Array:
    """Product with weights whose gradients are summed, and leave this function, in float32.

    JAX's own rule sums the bias over all tokens in x's dtype and rounds the kernel's gradient to
    it, and devices then add what was rounded.

    Args:
      x: [..., c] in the dtype of the computation.
      kernel: [c, f], rounded to that dtype here.
      bias: [f] likewise, or None.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      [..., f] like x.
    """
    y = jax.lax.dot_general(x, kernel.astype(x.dtype), _contract((x.ndim - 1,), (0,)), precision)
    return y if bias is None else y + bias.astype(x.dtype)


def _sum_of_rows(x: Array) -> Array:
    """The sum of x [..., f] over all axes but the last, [f], in float32 or better.

    Of bfloat16 it is a product with ones, exact but for the float32 sums of the matrix unit: a
    TPU's vector unit would take four times as long (compiler's estimate, v6e, [32768, 6144]).
    """
    leading = tuple(range(x.ndim - 1))
    if x.dtype != jnp.bfloat16:
        return jnp.sum(x, leading)
    ones = jnp.ones((_SUBLANES, *x.shape[:-1]), x.dtype)  # of one row the compiler makes a sum
    axes = _contract(tuple(axis + 1 for axis in leading), leading)
    sums = jax.lax.dot_general(ones, x, axes, preferred_element_type=jnp.float32)
    return jax.lax.index_in_dim(sums, 0, keepdims=False)


def _contract(left: tuple[int, ...], right: tuple[int, ...]) -> Any:
    return ((left, right), ((), ()))


def _linear_forward(x: Array, kernel: Array, bias: Array | None, precision: Any) -> Any:
    return linear(x, kernel, bias, precision), (x, kernel, bias)


def _linear_backward(precision: Any, residuals: Any, dy: Array) -> Any:
    x, kernel, bias = residuals
    leading = tuple(range(x.ndim - 1))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), _contract((x.ndim - 1,), (1,)), precision)
    dkernel = jax.lax.dot_general(
        x, dy, _contract(leading, leading), precision, preferred_element_type=wide
    )
    dbias = None if bias is None else _sum_of_rows(dy).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


linear.defvjp(_linear_forward, _linear_backward)


def gelu(x: Array) -> Array:
    """The exact GELU, x/2 (1 + erf(x/sqrt(2))); of bfloat16 computed in float32, rounded once.

    JAX writes it with erfc, which has two branches: in a ViT-L's feed-forward layer on a v6e that
    takes twice as long as its first product (compiler's estimate).
    """
    if x.dtype != jnp.bfloat16:
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def materialised(x: Array) -> Array:
    """The same array, written to memory once.

    Between two products a compiler may fuse an activation into the second, which then computes it
    once for every block of its columns.
    """
    return jax.lax.optimization_barrier(x)


class Dense(nn.Module):
    """Linear layer, see `linear`: [..., c] -> [..., features] in `dtype`, a name of remat 'dots'.

    Parameters as of `nn.Dense`: kernel [c, features], bias [features], float32.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return checkpoint_name(linear(x.astype(self.dtype), kernel, bias, self.precision), PRODUCT)


class PatchProjection(nn.Module):
    """The patch convolution as one matrix product: [b, h, w, c] -> [b, h/p, w/p, features].

    Patches do not overlap, so nothing is computed twice; the gradient with respect to the image
    is a product too, many times faster than a strided convolution's. Kernel [p, p, c, features].
    """

    features: int
    patch_size: int
    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images: Array) -> Array:
        b, h, w, c = images.shape
        p, d = self.patch_size, self.features
        kernel = self.param("kernel", self.kernel_init, (p, p, c, d), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        flat = patches.reshape(b, h // p, w // p, p * p * c).astype(self.dtype)
        return linear(flat, kernel.reshape(p * p * c, d), bias, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolution whose kernel's gradient leaves this function in float32, as in `linear`.

    Args:
      x: [b, h, w, c] in the dtype of the computation.
      kernel: [k, k, c, f], rounded to that dtype here.
      stride: along both sides.
      padding: zeros on all four sides.

    Returns:
      [b, h', w', f] like x.
    """
    return _convolve(x, kernel.astype(x.dtype), stride, padding, 1)


def _convolve(x: Array, kernel: Array, stride: int, padding: int, groups: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _convolve_forward(x: Array, kernel: Array, stride: int, padding: int) -> Any:
    return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride: int, padding: int, residuals: Any, dy: Array) -> Any:
    x, kernel = residuals
    rounded = kernel.astype(x.dtype)
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, rounded, stride, padding, 1), x)(dy)
    # The examples are the channels of this convolution, and the channels its examples.
    sides = zip(kernel.shape[:2], x.shape[1:3], dy.shape[1:3], strict=True)
    ends = tuple((padding, size + (out - 1) * stride - side - padding) for size, side, out in sides)
    dkernel = jax.lax.conv_general_dilated(
        x,
        dy,
        window_strides=(1, 1),
        padding=ends,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return dx, dkernel.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """The sum of x [..., f] and bias [f] in x's dtype; the bias's gradient is a float32 sum."""
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> Any:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, dy: Array) -> Any:
    return dy, _sum_of_rows(dy).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Conv2d(nn.Module):
    """Convolution with explicit symmetric zero padding and PyTorch's default initialisation.

    "SAME" would pad unevenly at stride 2 and shift the output by a pixel, so `padding` pixels
    (None: half the kernel) are added on all four sides. Kernel and bias are drawn from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = kernel_size^2 * channels / groups.

    [b, h, w, c] -> [b, h', w', features] in `dtype`, h' = floor((h + 2 padding - kernel) / stride)
    + 1.

    With `blocks` above 1 the output channels come in so many blocks: channel c*blocks + i of the
    stored kernel is put out as channel i*features/blocks + c.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    blocks: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, channels = self.kernel_size, x.shape[-1] // self.groups
        pad = size // 2 if self.padding is None else self.padding
        init = uniform_init((size * size * channels) ** -0.5)
        kernel = self.param("kernel", init, (size, size, channels, self.features), jnp.float32)
        kernel, x = in_blocks(kernel, self.blocks), x.astype(self.dtype)
        if self.groups == 1:
            y = convolve(x, kernel, self.stride, pad)
        else:
            y = _convolve(x, kernel.astype(self.dtype), self.stride, pad, self.groups)
        if not self.use_bias:
            return y
        bias = self.param("bias", init, (self.features,), jnp.float32)
        return add_bias(y, in_blocks(bias, self.blocks))


def in_blocks(array: Array, blocks: int) -> Array:
    """[..., c * blocks] -> [..., blocks * c]."""
    if blocks == 1:
        return array
    return array.reshape(*array.shape[:-1], -1, blocks).swapaxes(-1, -2).reshape(array.shape)


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

    [b, h, w, c] -> [b, h', w', features] in `dtype`, rounded once behind a norm and activation.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    norm: str | None = None
    act: str | None = None
    dtype: Dtype = jnp.float32
    blocks: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv2d(
            self.features,
            self.kernel_size,
            self.stride,
            groups=self.groups,
            use_bias=self.use_bias,
            dtype=self.dtype,
            blocks=self.blocks,
            name="conv",
        )(x)
        y = ACTIVATIONS[self.act](apply_norm(self.norm, x, train, name="norm"))
        return y.astype(self.dtype)


def rematerialised(block: type[nn.Module], remat: str, prevent_cse: bool) -> type[nn.Module]:
    """The block class with the given recomputation in its backward pass.

    Args:
      block: a module class.
      remat: see `remat_policy`.
      prevent_cse: needed outside a loop, where the compiler would undo the recomputation.

    Returns:
      The class to build the blocks from.

    Raises:
      ValueError: for another value of `remat`.
    """
    if remat == "none":
        return block
    return nn.remat(block, policy=remat_policy(remat), prevent_cse=prevent_cse)


def remat_policy(remat: str) -> Any:
    """The policy of `jax.checkpoint` for "dots" (keep products with weights, and attention) or
    "full" (keep nothing).

    Raises:
      ValueError: for another value of `remat`.
    """
    policies = {"dots": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}
    if remat not in policies:
        raise ValueError(f"remat is 'none', 'dots' or 'full'; got {remat!r}; choose one of them")
    return policies[remat]
