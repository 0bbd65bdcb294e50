"""The autoencoder: stem, frozen encoder and decoder as one set of pure functions.

Parameters are passed by role, {"stem": {"params": ...}, "vit": ..., "decoder": ...}; a decoder
with batch norm has "batch_stats" beside its "params", one with statistics of its latents
"statistics". The student and the teacher share the ViT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from dinosae_jax import encoders, names
from dinosae_jax.models import preprocessing, registry
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.stem import ConvStem, PatchStem
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.models.vit_decoder import ViTDecoder

Array = jax.Array
Variables = Mapping[str, Any]


PIXEL_RANGES: dict[names.PixelRange, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (names.IMAGENET_MEAN, names.IMAGENET_STD),
    "unit": ((0.0,), (1.0,)),
    "symmetric": ((0.5,), (0.5,)),
}
"""Mean and standard deviation that take the decoder's output to [0, 1], by name.

imagenet: the decoder predicts pixels normalised like the encoder's input; unit: it predicts
[0, 1]; symmetric: [-1, 1].
"""


@dataclasses.dataclass(frozen=True)
class AutoencoderModules:
    """The networks without their parameters, and the decoder's pixel range.

    Attributes:
      stem: from normalised images to a patch grid.
      vit: from a patch grid to tokens.
      decoder: from a latent grid to pixels.
      pixel_range: a key of `PIXEL_RANGES`.
      preprocessing: how the encoder's images are resized and normalised.
    """

    stem: ConvStem | PatchStem
    vit: VisionTransformer
    decoder: Decoder | ViTDecoder
    pixel_range: names.PixelRange = "imagenet"
    preprocessing: encoders.Preprocessing = encoders.FAMILIES["dinov3"].preprocessing


class EncoderOutput(NamedTuple):
    """Tokens of an image.

    tokens: [b, n, d] float32 patch tokens after the final norm, row-major grid: the latent z.
    cls: [b, d] float32 class token after the final norm.
    grid: (height, width) of the patch grid, n = height * width.
    """

    tokens: Array
    cls: Array
    grid: tuple[int, int]


def build(model_config: Mapping[str, Any], dtype: Dtype = jnp.float32) -> AutoencoderModules:
    """Makes the modules of a configuration.

    Args:
      model_config: "stem", "vit" and "decoder" hold the keyword arguments of `ConvStem`,
        `VisionTransformer` and `Decoder`; the stem's may hold kind="patch" for `PatchStem`
        (default "conv"), the decoder's kind="vit" for `ViTDecoder`. "pixel_range" is a key of
        `PIXEL_RANGES` (default "imagenet"), "encoder" of `encoders.FAMILIES` (default "dinov3").
      dtype: of matmuls and convolutions.

    Returns:
      The modules.

    Raises:
      ValueError: if the widths of the parts differ or a name is unknown.
    """
    pixel_range = model_config.get("pixel_range", "imagenet")
    if pixel_range not in PIXEL_RANGES:
        raise ValueError(
            f"pixel_range is one of {', '.join(PIXEL_RANGES)}; got {pixel_range!r}; choose one"
        )
    modules = AutoencoderModules(
        registry.build("stem", model_config["stem"], dtype=dtype),
        registry.build("vit", model_config["vit"], dtype=dtype),
        registry.build("decoder", model_config["decoder"], dtype=dtype),
        pixel_range,
        encoders.family(model_config).preprocessing,
    )
    widths = (modules.stem.embed_dim, modules.vit.embed_dim, modules.decoder.latent_channels)
    if len(set(widths)) > 1:
        raise ValueError(
            "stem.embed_dim, vit.embed_dim and decoder.latent_channels must be equal; got "
            f"{widths}; set all three to the ViT's"
        )
    return modules


def init(modules: AutoencoderModules, key: Array, image_size: int) -> dict[str, dict[str, Any]]:
    """Draws all variables; call it under `jax.jit`, so that the forward passes cost nothing.

    Args:
      modules: what `build` returned.
      key: random key.
      image_size: side of the square images that the shapes are traced with, a multiple of 16.

    Returns:
      {role: {"params": ..., and "batch_stats" if there are any}} for stem, vit and decoder,
      float32.
    """
    keys = jax.random.split(key, 3)
    images = jnp.zeros((1, image_size, image_size, 3))
    prepared = preprocessing.prepare(images, modules.preprocessing, modules.stem.patch_size)
    patches, stem = modules.stem.init_with_output(keys[0], prepared)
    vit = modules.vit.init(keys[1], patches)
    decoder = modules.decoder.init(keys[2], patches)
    return {"stem": dict(stem), "vit": dict(vit), "decoder": dict(decoder)}


def unit_interval(images: Any) -> Any:
    """8-bit images [...] uint8, of numpy or jax, as float32 in [0, 1]: what `encode` takes."""
    return images.astype(np.float32) / np.float32(255.0)


def to_pixels(modules: AutoencoderModules, output: Array) -> Array:
    """Maps the decoder's raw output [b, h, w, 3] to about [0, 1], float32, not clipped."""
    mean, std = PIXEL_RANGES[modules.pixel_range]
    return output.astype(jnp.float32) * jnp.array(std) + jnp.array(mean)


def encode(modules: AutoencoderModules, variables: Variables, images: Array) -> EncoderOutput:
    """Tokens of the student: stem, then ViT.

    Args:
      modules: what `build` returned.
      variables: roles stem and vit.
      images: [b, h, w, 3] float32 in [0, 1], any height and width.

    Returns:
      The tokens; a convolutional stem rounds the grid up, (ceil(h/16), ceil(w/16)).
    """
    prepared = preprocessing.prepare(images, modules.preprocessing, modules.stem.patch_size)
    patches = modules.stem.apply(variables["stem"], prepared)
    return _transform(modules, variables, patches)


def encode_teacher(
    modules: AutoencoderModules, variables: Variables, images: Array
) -> EncoderOutput:
    """Tokens of the teacher: the encoder's own patch convolution, then the same ViT.

    Args:
      modules: what `build` returned.
      variables: role vit.
      images: [b, h, w, 3] float32 in [0, 1].

    Returns:
      The tokens; the patch convolution rounds the grid down, so it is the student's for sides
      that are multiples of 16.
    """
    prepared = preprocessing.prepare(images, modules.preprocessing, modules.vit.patch_size)
    patches = modules.vit.apply(variables["vit"], prepared, method=VisionTransformer.embed_patches)
    return _transform(modules, variables, patches)


def _transform(modules: AutoencoderModules, variables: Variables, patches: Any) -> EncoderOutput:
    output: Any = modules.vit.apply(variables["vit"], patches)
    return EncoderOutput(output.patches, output.cls, patches.shape[1:3])


def decode(
    modules: AutoencoderModules,
    variables: Variables,
    z: Array,
    grid: tuple[int, int],
    train: bool = False,
) -> Array:
    """Images of latents.

    Args:
      modules: what `build` returned.
      variables: role decoder.
      z: [b, n, d] float32 latents.
      grid: (height, width) of the patch grid.
      train: whether batch norm uses the statistics of the batch (`decode_features` returns
        the new running statistics).

    Returns:
      [b, 16*height, 16*width, 3] float32 in about [0, 1], not clipped.
    """
    features, _ = decode_features(modules, variables, z, grid, train)
    return decode_head(modules, variables, features)


def decode_features(
    modules: AutoencoderModules,
    variables: Variables,
    z: Array,
    grid: tuple[int, int],
    train: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """Input of the decoder's last layer; `decode_head` does the rest.

    Args:
      modules: what `build` returned.
      variables: role decoder.
      z: [b, n, d] float32 latents.
      grid: (height, width) of the patch grid.
      train: whether batch norm uses and updates the statistics of the batch.

    Returns:
      ([b, h, w, c] features, the collection `batch_stats`, empty without batch norm).

    Raises:
      ValueError: if n is not height * width.
    """
    b, n, d = z.shape
    if n != grid[0] * grid[1]:
        raise ValueError(
            f"z must have one token per cell of the grid; got {n} tokens for a grid of "
            f"{tuple(grid)}; pass the grid that encode returned"
        )
    features, updates = modules.decoder.apply(
        variables["decoder"],
        z.reshape(b, *grid, d),
        train,
        method="features",
        mutable=["batch_stats"] if train else [],
    )
    stats = updates if train else variables["decoder"]
    return features, stats.get("batch_stats", {})


def decode_head(modules: AutoencoderModules, variables: Variables, features: Array) -> Array:
    """Applies the decoder's last layer and maps its output to [0, 1].

    Args:
      modules: what `build` returned.
      variables: role decoder; of its parameters only the last layer's are used, the kernel at
        `modules.decoder.last_kernel_path`.
      features: what `decode_features` returned.

    Returns:
      [b, 16*height, 16*width, 3] float32 in about [0, 1], not clipped.
    """
    output: Any = modules.decoder.apply(variables["decoder"], features, method="head")
    return to_pixels(modules, output)


def has_teacher(variables: Variables) -> bool:
    """Whether the ViT has its own patch convolution, which official DINO-SAE files lack."""
    return "patch_embed" in variables["vit"]["params"]
