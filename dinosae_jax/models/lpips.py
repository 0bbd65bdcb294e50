"""LPIPS, the learned perceptual distance: VGG16 features and the published v0.1 channel weights.

Mirrors lpips/lpips.py of richzhang/PerceptualSimilarity with net='vgg', version 0.1, in evaluation
mode (Zhang et al., arXiv 1801.03924).

Parameter tree (torchvision or LPIPS checkpoint key -> path):

    features.{N}.weight, bias    features_{N}/{kernel [3, 3, in, out], bias}, N of torchvision
    lin{j}.model.1.weight        lin{j}/model_1/kernel [1, 1, c, 1], j = 0..4
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Index of each convolution in torchvision's `features`, and its output channels, by tap.
STAGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
MINIMUM_SIDE = 16


def unit_normalise(features: jax.Array) -> jax.Array:
    """Divides each feature vector by its norm plus 1e-10.

    Zero vectors stay zero with zero gradient; the plain formula would give NaN there.

    Args:
      features: [b, h, w, c], any float dtype.

    Returns:
      [b, h, w, c] float32.
    """
    features = features.astype(jnp.float32)
    squared = jnp.square(features).sum(-1, keepdims=True)
    nonzero = squared > 0
    norm = jnp.sqrt(jnp.where(nonzero, squared, 1.0))
    return features * jnp.where(nonzero, 1.0 / (norm + EPSILON), 0.0)


class ChannelWeights(nn.Module):
    """Non-negative weights of a tap's channels, applied to the spatial mean [b, c] -> [b]."""

    @nn.compact
    def __call__(self, differences: jax.Array) -> jax.Array:
        conv = nn.Conv(
            1,
            (1, 1),
            use_bias=False,
            kernel_init=nn.initializers.constant(1.0 / differences.shape[-1]),
            precision="highest",
            name="model_1",
        )
        return conv(differences[:, None, None, :])[:, 0, 0, 0]


class LPIPS(nn.Module):
    """LPIPS distance between images, with its parts as methods.

    `__call__(a, b)` is the whole. Training computes `features(target)` once and
    `per_layer(target_features, features(reconstruction))` under the gradient; differentiating with
    respect to the reconstruction alone needs one backward pass of the VGG in either form.

    Attributes:
      dtype: of the convolutions; normalisation and reductions are float32.
    """

    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.convs = [
            [nn.Conv(c, (3, 3), dtype=self.dtype, name=f"features_{n}") for n, c in stage]
            for stage in STAGES
        ]
        self.weights = [ChannelWeights(name=f"lin{j}") for j in range(len(STAGES))]

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Computes the distance between a and b, both [b, h, w, 3] in [0, 1]: [b] float32."""
        return self.per_layer(self.features(a), self.features(b)).sum(-1)

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Computes the five taps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

        Args:
          images: [b, h, w, 3] in [0, 1], sides at least 16; values outside are not clipped.

        Returns:
          [b, h / 2^j, w / 2^j, c_j] in `dtype` for j = 0..4, c = 64, 128, 256, 512, 512.

        Raises:
          ValueError: if a side is below 16, where the last tap would be empty.
        """
        if min(images.shape[1:3]) < MINIMUM_SIDE:
            raise ValueError(
                f"LPIPS needs images of at least {MINIMUM_SIDE} pixels per side; got "
                f"{images.shape[1]} x {images.shape[2]}; enlarge them or drop lpips from the losses"
            )
        x = (2.0 * images.astype(jnp.float32) - 1.0 - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        taps: list[jax.Array] = []
        for convs in self.convs:
            if taps:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for conv in convs:
                x = nn.relu(conv(x))
            taps.append(x)
        return taps

    def per_layer(self, features_a: list[jax.Array], features_b: list[jax.Array]) -> jax.Array:
        """Compares the features of two batches of images.

        Args:
          features_a: what `features` returns for one batch.
          features_b: the same for the other.

        Returns:
          [b, 5] float32, the contribution of each tap; their sum is the distance.
        """
        distances = []
        for weights, a, b in zip(self.weights, features_a, features_b, strict=True):
            difference = unit_normalise(a) - unit_normalise(b)
            distances.append(weights(jnp.square(difference).mean((1, 2))))
        return jnp.stack(distances, axis=-1)
