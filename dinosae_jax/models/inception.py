"""The Inception network of FID, Inception Score, sFID and Precision/Recall.

It is TensorFlow's "2015-12-05" graph as ported by pytorch-fid (inception.py) and torch-fidelity
(feature_extractor_inceptionv3.py), which differs from torchvision's inception_v3: the 3x3 average
pools leave padding out of the divisor, the last block has a max pool instead, there are 1008
outputs. Everything is float32 at the highest matmul precision, whatever the process's default,
because its results are compared with those of papers.

Variable tree (checkpoint key -> path), for each convolution, P = `Conv2d_1a_3x3` or
`Mixed_5b.branch1x1` and so on (the dot becomes a level of the tree):

    P.conv.weight                       params        P/conv/kernel [kh, kw, in, out]
    P.bn.weight, bias                   params        P/bn/{scale, bias}
    P.bn.running_mean, running_var      batch_stats   P/bn/{mean, var}
    fc.weight, fc.bias                  params        fc/{kernel [2048, 1008], bias}
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

INPUT_SIDE = 299
BATCH_NORM_EPSILON = 1e-3
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7


def resize_tf1(images: jax.Array, side: int = INPUT_SIDE) -> jax.Array:
    """Resizes as TensorFlow 1 did: bilinear, the output grid starting at the first pixel's centre.

    Args:
      images: [b, h, w, c] float32.
      side: height and width of the result.

    Returns:
      [b, side, side, c] float32.
    """
    for axis in (2, 1):  # columns first, as the reference's rounding has it
        length = images.shape[axis]
        positions = np.arange(side, dtype=np.float32) * (np.float32(length) / np.float32(side))
        low = np.floor(positions).astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        shape = [side if i == axis else 1 for i in range(4)]
        fraction = (positions - low.astype(np.float32)).reshape(shape)
        below, above = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = below + (above - below) * fraction
    return images


def resize_half_pixel(images: jax.Array, side: int = INPUT_SIDE) -> jax.Array:
    """Resizes [b, h, w, c] to [b, side, side, c], bilinear, half-pixel centres, no antialiasing."""
    shape = (images.shape[0], side, side, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=False)


def preprocess(images: jax.Array, pipeline: str) -> jax.Array:
    """Resizes and scales images as one of the two families of FID implementations does.

    Args:
      images: [b, h, w, 3] uint8.
      pipeline: 'tf1' (ADM's evaluator, torch-fidelity) or 'pytorch_fid' (pytorch-fid,
        LightningDiT). Statistics of one are not comparable with features of the other.

    Returns:
      [b, 299, 299, 3] float32, about [-1, 1].

    Raises:
      ValueError: if the images are not uint8 or the pipeline is unknown.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"InceptionFID takes uint8 images; got {images.dtype}; convert them with the rounding "
            "that your recipe names"
        )
    pixels = images.astype(jnp.float32)
    if pipeline == "tf1":
        return (resize_tf1(pixels) - 128.0) / 128.0
    if pipeline == "pytorch_fid":
        return 2.0 * resize_half_pixel(pixels / 255.0) - 1.0
    raise ValueError(
        f"the resize pipeline is 'tf1' or 'pytorch_fid'; got {pipeline!r}; choose one of them"
    )


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with stored statistics, ReLU.

    Attributes:
      features: output channels.
      kernel: taps in y and x.
      stride: in both directions.
      padding: 'SAME' or 'VALID'.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = nn.Conv(
            self.features,
            self.kernel,
            strides,
            self.padding,
            use_bias=False,
            precision="highest",
            name="conv",
        )
        norm = nn.BatchNorm(use_running_average=True, epsilon=BATCH_NORM_EPSILON, name="bn")
        return nn.relu(norm(conv(x)))


def _chain(x: jax.Array, branch: str, *layers: tuple[int, int, int]) -> jax.Array:
    """Applies branch_1, branch_2, ... given as (features, taps in y, taps in x)."""
    for i, (features, *kernel) in enumerate(layers, 1):
        x = ConvNorm(features, (kernel[0], kernel[1]), name=f"{branch}_{i}")(x)
    return x


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """Mixed_5b, 5c, 5d: [b, 35, 35, c] -> [b, 35, 35, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            ConvNorm(64, name="branch1x1")(x),
            _chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            ConvNorm(self.pool_features, name="branch_pool")(_average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """Mixed_6a: [b, 35, 35, 288] -> [b, 17, 17, 768]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3))
        branches = [
            ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """Mixed_6b to 6e: [b, 17, 17, 768] -> [b, 17, 17, 768], the first 192 from the 1x1 branch."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.width
        double = ((c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
        branches = [
            ConvNorm(192, name="branch1x1")(x),
            _chain(x, "branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
            _chain(x, "branch7x7dbl", *double),
            ConvNorm(192, name="branch_pool")(_average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """Mixed_7a: [b, 17, 17, 768] -> [b, 8, 8, 1280]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = ConvNorm(192, name="branch3x3_1")(x)
        deep = _chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
        branches = [
            ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(wide),
            ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(deep),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """Mixed_7b, 7c: [b, 8, 8, c] -> [b, 8, 8, 2048]; 7c has a max pool where 7b has the average."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = ConvNorm(384, name="branch3x3_1")(x)
        double = _chain(x, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else _average_pool(x)
        branches = [
            ConvNorm(320, name="branch1x1")(x),
            ConvNorm(384, (1, 3), name="branch3x3_2a")(single),
            ConvNorm(384, (3, 1), name="branch3x3_2b")(single),
            ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(double),
            ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(double),
            ConvNorm(192, name="branch_pool")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class Classifier(nn.Module):
    """Linear layer, without and with the bias: [b, d] -> two arrays [b, 1008]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], NUM_CLASSES)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (NUM_CLASSES,))
        unbiased = jnp.matmul(x, kernel, precision="highest")
        return unbiased, unbiased + bias


class InceptionFID(nn.Module):
    """Features for FID and its relatives.

    Attributes:
      pipeline: 'tf1' or 'pytorch_fid', see `preprocess`.
    """

    pipeline: str = "tf1"

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Computes every tap; an unused tap costs nothing under jit.

        Args:
          images: [b, h, w, 3] uint8, any sides.

        Returns:
          float32 arrays: '64', '192', '768' and '2048' [b, that many], spatial means after the
          first and second max pool, Mixed_6e and Mixed_7c ('2048' is the feature of FID and
          Precision/Recall); 'logits_unbiased' [b, 1008] (Inception Score) and 'logits';
          'spatial' [b, 2023], the 17 x 17 x 7 map of sFID: the first 7 channels of the 1x1 branch
          of Mixed_6d.

        Raises:
          ValueError: if the images are not uint8 or the pipeline is unknown.
        """
        x = preprocess(images, self.pipeline)
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = tap_64 = _halve(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = tap_192 = _halve(ConvNorm(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160)):
            x = BlockC(width, name=name)(x)
        x = mixed_6d = BlockC(160, name="Mixed_6d")(x)
        x = tap_768 = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(max_pool=False, name="Mixed_7b")(x)
        x = BlockE(max_pool=True, name="Mixed_7c")(x)
        pooled = x.mean((1, 2))
        unbiased, logits = Classifier(name="fc")(pooled)
        return {
            "64": tap_64.mean((1, 2)),
            "192": tap_192.mean((1, 2)),
            "768": tap_768.mean((1, 2)),
            "2048": pooled,
            "logits_unbiased": unbiased,
            "logits": logits,
            "spatial": mixed_6d[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1),
        }
