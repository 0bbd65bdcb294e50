"""EfficientNet-Lite0: a pretrained feature space for those who do not have FID's Inception.

Tan & Le, "EfficientNet" (arXiv 1905.11946), table 1 (B0), in TensorFlow's Lite form of 2020:
no squeeze-and-excitation, ReLU6 for swish, stem and head of fixed width. The names are those of
EfficientNet-PyTorch's port, which the checkpoint follows. Paddings are TensorFlow's SAME at a side
of 224, where every map that is halved has an even side: a halving 3x3 window reads 0 pixels before
and 1 after, a 5x5 one 1 and 2. Everything is float32 at the highest matmul precision, whatever the
process's default, so that distances of different machines compare.

Variable tree (checkpoint key -> path), C a convolution, N a batch norm, i a block:

    _conv_stem.weight, _conv_head.weight     params        C/kernel [k, k, in, out]
    _blocks.{i}._depthwise_conv.weight       params        _blocks_{i}/C/kernel [k, k, 1, c]
    _bn0, _bn1, _blocks.{i}._bn{0,1,2}       params        N/{scale, bias}
    N.running_mean, running_var              batch_stats   N/{mean, var}
    _fc.weight, bias                         params        _fc/{kernel [1280, 1000], bias}
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax.models.inception import resize_half_pixel

INPUT_SIDE = 224
BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride, the others have stride 1 and a skip."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def preprocess(images: jax.Array) -> jax.Array:
    """Resizes and scales images as the network was trained on: (x - 127) / 128.

    Args:
      images: [b, h, w, 3] uint8.

    Returns:
      [b, 224, 224, 3] float32, about [-1, 1].

    Raises:
      ValueError: if the images are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"EfficientNetLite0 takes uint8 images; got {images.dtype}; convert them with the "
            "rounding that your recipe names"
        )
    return (resize_half_pixel(images.astype(jnp.float32), INPUT_SIDE) - 127.0) / 128.0


def _convolution(
    name: str, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv:
    before = (kernel - stride) // 2  # TensorFlow's SAME for sides that the stride divides
    padding = (before, kernel - stride - before)
    return nn.Conv(
        channels,
        (kernel, kernel),
        stride,
        (padding, padding),
        feature_group_count=groups,
        use_bias=False,
        precision="highest",
        name=name,
    )


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=BATCH_NORM_EPSILON, name=name)


class MBConv(nn.Module):
    """Inverted residual block: widen, depthwise convolution, narrow without activation.

    Attributes:
      kernel: taps of the depthwise convolution in y and x.
      stride: of the same.
      expansion: of the width between; at 1 there is no widening convolution.
      channels: of the result.
    """

    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to [b, h / stride, w / stride, channels], with a skip where it fits."""
        wide = self.expansion * x.shape[-1]
        h = x
        if self.expansion > 1:
            h = nn.relu6(_norm("_bn0")(_convolution("_expand_conv", wide, 1)(h)))
        depthwise = _convolution("_depthwise_conv", wide, self.kernel, self.stride, groups=wide)
        h = nn.relu6(_norm("_bn1")(depthwise(h)))
        h = _norm("_bn2")(_convolution("_project_conv", self.channels, 1)(h))
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Module):
    """ImageNet-1k's classes and the features below them."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Computes both taps; an unused tap costs nothing under jit.

        Args:
          images: [b, h, w, 3] uint8, any sides.

        Returns:
          float32 arrays: 'pool' [b, 1280], the spatial mean that the classifier reads, and
          'logits' [b, 1000], classes in the order of their WordNet ids.

        Raises:
          ValueError: if the images are not uint8.
        """
        x = preprocess(images)
        x = nn.relu6(_norm("_bn0")(_convolution("_conv_stem", STEM_CHANNELS, 3, 2)(x)))
        widened = [
            (stage.kernel, stage.stride if first else 1, stage.expansion, stage.channels)
            for stage in STAGES
            for first in (True, *[False] * (stage.blocks - 1))
        ]
        for number, settings in enumerate(widened):
            x = MBConv(*settings, name=f"_blocks_{number}")(x)
        x = nn.relu6(_norm("_bn1")(_convolution("_conv_head", HEAD_CHANNELS, 1)(x)))
        pooled = x.mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, precision="highest", name="_fc")(pooled)
        return {"pool": pooled, "logits": logits}
