"""From the image to a grid of patch tokens: a convolutional stem, or an encoder's patches."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax import names
from dinosae_jax.models.layers import Conv2d, ConvLayer

Array = jax.Array


class ConvStem(nn.Module):
    """DINO-SAE's convolutional stem: four stride-2 convolutions without bias.

    The first has a 7x7 kernel, the others 3x3; each but the last is followed by an `ImageRMSNorm`
    and SiLU. Mirrors CnnPatchEmbed of DINO-SAE's src/model.py. Without biases the first norm makes
    the stem blind to contrast: images that differ by a factor about ImageNet's mean colour have the
    same tokens. `norm=None` leaves the norms out.

    [b, h, w, 3] float32 normalised pixels -> [b, ceil(h/16), ceil(w/16), embed_dim] float32.
    """

    embed_dim: int
    widths: tuple[int, ...] = (64, 128, 256)
    dtype: Dtype = jnp.float32
    norm: str | None = "trms2d"

    @property
    def patch_size(self) -> int:
        """Pixels per side of a token: its stride."""
        return names.PATCH_SIZE

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images
        for i, width in enumerate(self.widths):
            x = ConvLayer(
                width,
                kernel_size=7 if i == 0 else 3,
                stride=2,
                use_bias=False,
                norm=self.norm,
                act="silu",
                dtype=self.dtype,
                name=f"cnn_{i}",
            )(x)
        last = ConvLayer(
            self.embed_dim,
            stride=2,
            use_bias=False,
            dtype=self.dtype,
            name=f"cnn_{len(self.widths)}",
        )
        return last(x).astype(jnp.float32)


class PatchStem(nn.Module):
    """An encoder's patch embedding: one convolution of a patch's size; incomplete patches are cut.

    [b, h, w, 3] float32 normalised pixels -> [b, h//patch, w//patch, embed_dim] float32.
    """

    embed_dim: int
    patch_size: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        proj = Conv2d(
            self.embed_dim,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            padding=0,
            dtype=self.dtype,
            name="proj",
        )
        return proj(images).astype(jnp.float32)
