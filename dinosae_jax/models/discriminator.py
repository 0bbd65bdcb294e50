"""Discriminator heads on DINO v1 activations, with spectral norm and per-sample batch norm.

They mirror RAE's heads (arXiv 2510.11690), which are those of StyleGAN-T
(networks/discriminator.py, arXiv 2301.09515) without conditioning. For each activation a [b, n, c]:

    h = block_1(a);  h = (h + block_9(h)) / sqrt(2);  logits [b, n] = spectral 1x1 convolution of h
    block_k = spectral convolution, k taps, circular over the raster of tokens -> LocalBatchNorm
              -> LeakyReLU(0.2)

Variable tree (state-dict key -> path, i = head):

    heads.{i}.0.0.weight_orig, bias      params    heads_{i}_0_0/{kernel [1, c, c], bias [c]}
    heads.{i}.0.1.weight, bias           params    heads_{i}_0_1/{scale, bias} [c]
    heads.{i}.1.fn.0.weight_orig, bias   params    heads_{i}_1/fn_0/{kernel [k, c, c], bias [c]}
    heads.{i}.1.fn.1.weight, bias        params    heads_{i}_1/fn_1/{scale, bias} [c]
    heads.{i}.2.weight_orig, bias        params    heads_{i}_2/{kernel [1, c, 1], bias [1]}
    (same).weight_u, weight_v            spectral  (same)/{u [out], v [in * k]}

Kernels are [k, in, out] (torch [out, in, k] reversed). v runs over torch's memory order: input
channel first, tap last. Everything here is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

INIT_POWER_ITERATIONS = 20
LEAKY_SLOPE = 0.2


def _normalise(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


def _power_iteration(matrix: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step v <- M^T u, u <- M v, each normalised, for M [out, in * k]; returns (u, v)."""
    v = _normalise(jnp.matmul(u, matrix, precision="highest"))
    return _normalise(jnp.matmul(matrix, v, precision="highest")), v


class SpectralConv(nn.Module):
    """1-D convolution, circular over its length, whose kernel is divided by its spectral norm.

    The vectors (u, v) in collection `spectral` hold the power iteration: `train=True` advances it
    once per call (the collection must be mutable), `train=False` uses them as stored. They are
    constants for the gradient, which flows through the kernel in sigma = u^T M v. `init` runs 20
    iterations, so that sigma is the true norm before the first update: with random vectors the
    effective kernel would be about 100 times too large.

    Attributes:
      features: output channels.
      kernel_size: odd number of taps.
      precision: of the convolution's products.
    """

    features: int
    kernel_size: int = 1
    precision: str = "highest"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Convolves [b, n, c] to [b, n, features]."""
        taps, channels = self.kernel_size, x.shape[-1]
        bound = 1.0 / math.sqrt(channels * taps)
        kernel = self.param("kernel", _uniform(bound), (taps, channels, self.features))
        bias = self.param("bias", _uniform(bound), (self.features,))
        matrix = kernel.transpose(2, 1, 0).reshape(self.features, channels * taps)
        frozen = jax.lax.stop_gradient(matrix)

        u = self.variable("spectral", "u", lambda: self._converged_u(frozen))
        v = self.variable("spectral", "v", lambda: _power_iteration(frozen, u.value)[1])
        if train and not self.is_initializing():
            u.value, v.value = _power_iteration(frozen, u.value)
        sigma = jnp.vdot(u.value, jnp.matmul(matrix, v.value, precision="highest"))

        side = taps // 2
        padded = jnp.pad(x, ((0, 0), (side, side), (0, 0)), mode="wrap")
        layout = ("NWC", "WIO", "NWC")
        return (
            jax.lax.conv_general_dilated(
                padded,
                kernel / sigma,
                (1,),
                "VALID",
                dimension_numbers=layout,
                precision=self.precision,
            )
            + bias
        )

    def _converged_u(self, matrix: jax.Array) -> jax.Array:
        u = _normalise(jax.random.normal(self.make_rng("params"), (self.features,)))
        return jax.lax.fori_loop(
            0, INIT_POWER_ITERATIONS, lambda _, u: _power_iteration(matrix, u)[0], u
        )


def _uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound), torch's initialisation of convolutions for bound = 1/sqrt(fan in)."""

    def initialise(key: jax.Array, shape: Sequence[int], dtype: type = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


class LocalBatchNorm(nn.Module):
    """Batch norm over virtual batches of consecutive images, without running statistics.

    With `virtual_batch=1` (RAE) each image is normalised over its own tokens, so that its logits do
    not depend on the other images nor on the sharding. StyleGAN-T has 8 and epsilon 1e-5.

    Attributes:
      virtual_batch: images per group; ceil(b / virtual_batch), the groups, must divide b.
      epsilon: added to the (biased) variance.
    """

    virtual_batch: int = 1
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [b, n, c] over (images of the group, n)."""
        b, n, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        grouped = x.reshape(-(-b // self.virtual_batch), -1, n, c)
        mean = grouped.mean((1, 2), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 2), keepdims=True)
        normed = (grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return normed.reshape(b, n, c) * scale + bias


class ResidualBlock(nn.Module):
    """(x + block_k(x)) / sqrt(2) on [b, n, c]."""

    kernel_size: int
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = SpectralConv(x.shape[-1], self.kernel_size, self.precision, name="fn_0")
        hidden = conv(x, train)
        hidden = nn.leaky_relu(LocalBatchNorm(name="fn_1")(hidden), LEAKY_SLOPE)
        return (x + hidden) / math.sqrt(2.0)


class DiscriminatorHeads(nn.Module):
    """One head per activation, logits concatenated in the order of the activations.

    Attributes:
      num_heads: number of activations, 1 + the trunk's number of key depths.
      channels: width c of the activations.
      kernel_size: taps of the residual block's convolution.
      precision: of the products of convolutions.
    """

    num_heads: int
    channels: int
    kernel_size: int = 9
    precision: str = "highest"

    @nn.compact
    def __call__(self, activations: Sequence[jax.Array], train: bool) -> jax.Array:
        """Computes one logit per activation and token.

        Args:
          activations: `num_heads` arrays [b, n, channels], as `DinoV1` returns them.
          train: whether to advance the power iteration of the spectral norm: True in the
            discriminator's step, False in the generator's and in evaluation.

        Returns:
          [b, num_heads * n] float32.

        Raises:
          ValueError: if the activations do not fit `num_heads` and `channels`.
        """
        shapes = [a.shape for a in activations]
        if len(shapes) != self.num_heads or any(shape[-1] != self.channels for shape in shapes):
            raise ValueError(
                f"these heads take {self.num_heads} activations of {self.channels} channels; got "
                f"shapes {shapes}; set num_heads and channels to those of the trunk"
            )
        logits = []
        for i, activation in enumerate(activations):
            name = f"heads_{i}"
            x = activation.astype(jnp.float32)
            x = SpectralConv(self.channels, 1, self.precision, name=f"{name}_0_0")(x, train)
            x = nn.leaky_relu(LocalBatchNorm(name=f"{name}_0_1")(x), LEAKY_SLOPE)
            x = ResidualBlock(self.kernel_size, self.precision, name=f"{name}_1")(x, train)
            last = SpectralConv(1, 1, self.precision, name=f"{name}_2")
            logits.append(last(x, train)[..., 0])
        return jnp.concatenate(logits, axis=1)
