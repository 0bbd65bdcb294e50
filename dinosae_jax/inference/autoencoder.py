"""A trained or converted autoencoder as three functions on arrays.

    autoencoder = Autoencoder.load("runs/stage4")
    z = autoencoder.encode(images)  # [b, h, w, 3] in [0, 1] -> [b, n, d]
    images = autoencoder.decode(z)

Arrays of any length are cut into batches, the last batch is padded, and every batch is split over
the devices of the mesh. Each size of image is compiled once.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray

from dinosae_jax import encoders
from dinosae_jax.inference import batching
from dinosae_jax.latent_convention import LatentConvention, norm_of
from dinosae_jax.models import autoencoder
from dinosae_jax.models.vit_decoder import ViTDecoder
from dinosae_jax.names import AUTOENCODER_ROLES, PATCH_SIZE
from dinosae_jax.runtime import jit, precision, sharding
from dinosae_jax.weights import weight_source

Tree = Any
Floats = NDArray[np.float32]


ROUNDING = 1e-4  # tolerance around [0, 1] for float arithmetic
STATED = ("pixel_range", "encoder")  # fields of a model config beside its roles
CONVERTED_TOKENS = 256  # for 256 x 256 pixels; converted weights do not state it


class Autoencoder:
    """Encoder and decoder with their parameters.

    Attributes:
      modules: the networks, static.
      variables: roles stem, vit and decoder, a copy on every device of `mesh`.
      convention: the meaning of the latents.
      notes: sentences stored with the weights, to be shown with every result.
      mesh: the devices that a batch is split over.
      batch_size: images at once, over all devices.
    """

    def __init__(
        self,
        source: weight_source.WeightSource,
        dtype: str = "auto",
        pixel_range: str = "",
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int = 32,
    ):
        """Builds the networks of a source of weights; see `load` for the arguments.

        Raises:
          ValueError: see `load`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size counts images, at least 1; got {batch_size}; raise it")
        source = complete(source, pixel_range)
        dtype = precision.resolve_dtype(dtype)
        self.modules = autoencoder.build(source.model, jnp.dtype(dtype))
        self.convention = LatentConvention.from_dict(source.convention)
        self.notes = list(source.notes)
        self.mesh = mesh or sharding.make_mesh()
        self.batch_size = batch_size
        variables = {role: source.variables[role] for role in AUTOENCODER_ROLES}
        self.variables = sharding.replicate(variables, self.mesh)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str = "auto",
        pixel_range: str = "",
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int = 32,
    ) -> Autoencoder:
        """Reads a stage's workdir (its newest checkpoint), a checkpoint, an export or a conversion.

        The weights of a training run are its moving averages.

        Args:
          directory: where the weights are.
          dtype: of matrix products and convolutions: 'float32', 'bfloat16', or 'auto' for
            bfloat16 on accelerators.
          pixel_range: what the decoder emits, a key of `models.autoencoder.PIXEL_RANGES`. Only
            converted weights do not state it; theirs is 'imagenet' unless given here.
          mesh: the devices; all of them by default.
          batch_size: images at once, rounded up to a multiple of the devices.

        Raises:
          ValueError: where there are no such weights, a role is missing, a file is damaged, or
            `pixel_range` contradicts what the weights state.
        """
        return cls(weight_source.open_weights(directory), dtype, pixel_range, mesh, batch_size)

    def encode(self, images: ArrayLike) -> Floats:
        """Latents of images.

        Args:
          images: [b, h, w, 3] floating point in [0, 1], sides multiples of 16.

        Returns:
          [b, n, d] float32, the patch tokens after the final norm; row-major grid of
          h/16 x w/16.

        Raises:
          ValueError: for another shape, dtype or range, before compilation.
        """
        return self._map(_compiled_encode(self.modules), check_images(images))

    def decode(self, z: ArrayLike, grid: tuple[int, int] | None = None) -> Floats:
        """Images of latents.

        Args:
          z: [b, n, d] floating point.
          grid: (height, width) in tokens, n = height * width; a square where it is None.

        Returns:
          [b, 16*height, 16*width, 3] float32, clipped to [0, 1].

        Raises:
          ValueError: for another shape, dtype, values that are not finite, or a grid that does
            not fit, before compilation.
        """
        latents, grid = self._check_latents(z, grid)
        return self._map(compiled_decode(self.modules, grid), latents)

    def reconstruct(self, images: ArrayLike) -> Floats:
        """`decode` of `encode`: [b, h, w, 3] in [0, 1], sides multiples of 16 -> the same shape."""
        checked = check_images(images)
        grid = (checked.shape[1] // PATCH_SIZE, checked.shape[2] // PATCH_SIZE)
        return self.decode(self.encode(checked), grid)

    def encode_teacher(self, images: ArrayLike) -> Floats:
        """Tokens of the frozen teacher on the same images, as `encode` returns them.

        Raises:
          ValueError: see `encode`; also where the weights have no patch convolution of the teacher.
        """
        if "patch_embed" not in self.variables["vit"]["params"]:
            raise ValueError(
                "the teacher's tokens need the encoder's own patch convolution; got weights "
                "without it (the official DINO-SAE file leaves it out); use weights trained from a "
                "converted DINOv3"
            )
        return self._map(_compiled_encode_teacher(self.modules), check_images(images))

    def _map(self, function: Callable[..., jax.Array], array: Floats) -> Floats:
        apply = functools.partial(function, self.variables)
        with precision.products_of(self.modules.vit.dtype):
            return batching.map_batches(apply, array, self.batch_size, self.mesh)

    def _check_latents(
        self, z: ArrayLike, grid: tuple[int, int] | None
    ) -> tuple[Floats, tuple[int, int]]:
        array, width = np.asarray(z), self.modules.vit.embed_dim
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        if not floating or array.ndim != 3 or not array.size or array.shape[-1] != width:
            raise ValueError(
                f"latents are floating point [b, n, {width}], b and n at least 1; got "
                f"{array.dtype} {list(array.shape)}; pass what encode returns"
            )
        latents, tokens = array.astype(np.float32, copy=False), array.shape[1]
        if not np.isfinite(latents).all():
            raise ValueError(
                "latents must be finite; got NaN or infinity; check what they were computed from"
            )
        height, across = grid or (math.isqrt(tokens),) * 2
        if height * across != tokens or min(height, across) < 1:
            raise ValueError(
                f"the grid of the latents has height * width = n; got {tokens} tokens and "
                f"{f'the grid {tuple(grid)}' if grid else 'no grid, which stands for a square'}; "
                "pass grid=(image height / 16, image width / 16)"
            )
        decoder = self.modules.decoder
        if isinstance(decoder, ViTDecoder) and (height, across) != (decoder.grid,) * 2:
            raise ValueError(
                f"a ViT decoder has one grid, {decoder.grid} tokens a side; got a grid of "
                f"{height} x {across}; resize images to {PATCH_SIZE * decoder.grid} pixels a side"
            )
        return latents, (int(height), int(across))


def complete(
    source: weight_source.WeightSource, pixel_range: str = ""
) -> weight_source.WeightSource:
    """Adds what converted weights do not state: pixel range and latent convention.

    Args:
      source: weights of an autoencoder.
      pixel_range: see `Autoencoder.load`.

    Returns:
      The source; where the weights did not state the two, a note states what is assumed, with the
      convention of 256-pixel images.

    Raises:
      ValueError: where a role is missing, or `pixel_range` contradicts what the weights state.
    """
    if not set(AUTOENCODER_ROLES) <= set(source.variables):
        raise ValueError(
            f"an autoencoder needs the roles {', '.join(AUTOENCODER_ROLES)}; got "
            f"{source.path} with only {', '.join(sorted(source.variables))}; name a stage's "
            "workdir, a checkpoint, an export, or weights converted with --kind=dinosae"
        )
    stated = source.model.get("pixel_range")
    if stated and pixel_range and stated != pixel_range:
        raise ValueError(
            f"the decoder of {source.path} was trained with pixel_range={stated!r}; got "
            f"{pixel_range!r}; leave the argument out"
        )
    if stated and source.convention:
        return source
    pixels = stated or pixel_range or "imagenet"
    width = source.model["vit"]["embed_dim"]
    grid = source.model["decoder"].get("grid")
    convention = LatentConvention(
        tokens=grid**2 if grid else CONVERTED_TOKENS,
        width=width,
        radius=math.sqrt(width),
        norm=norm_of(source.model["vit"]),
        pixels=pixels,
        encoder=encoders.reading(source.model),
    )
    note = (
        f"The weights state no latent convention; {convention.tokens} tokens, radius "
        f"{convention.radius:.4g} and pixel_range={pixels!r} are taken."
    )
    return source._replace(
        model={**source.model, "pixel_range": pixels},
        convention=convention.to_dict(),
        notes=[*source.notes, note],
    )


def random_source(model: Mapping[str, Any], seed: int) -> weight_source.WeightSource:
    """Random weights of a model config (stem, vit, decoder), for trials without weights."""
    parts = {name: model[name] for name in (*AUTOENCODER_ROLES, *STATED) if name in model}
    draw = _compiled_draw(autoencoder.build(parts))
    return weight_source.WeightSource(
        jax.device_get(draw(jax.random.PRNGKey(seed))),
        parts,
        {},
        [
            "All networks are randomly initialised (random_frozen_ok names them): the "
            "reconstructions show that the machinery works and nothing else."
        ],
        epath.Path("random"),
    )


def check_images(images: ArrayLike) -> Floats:
    """Checks images and returns them as float32 [b, h, w, 3].

    Raises:
      ValueError: for another shape, dtype or range, or sides that are not multiples of 16.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"images are [b, h, w, 3], at least one; got the shape {list(array.shape)}; add the "
            "batch axis with images[None], move the channels last"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"images are floating point in [0, 1]; got {array.dtype}; divide 8-bit images by 255.0"
        )
    height, width = array.shape[1:3]
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(
            f"image sides are multiples of {PATCH_SIZE}, the patch size; got {height} x {width}; "
            f"crop to {height - height % PATCH_SIZE} x {width - width % PATCH_SIZE} or resize"
        )
    array = array.astype(np.float32, copy=False)
    low, high = float(array.min()), float(array.max())
    if not (low >= -ROUNDING and high <= 1.0 + ROUNDING):  # NaN fails, too
        raise ValueError(
            f"image values lie in [0, 1]; got {low:.4g} to {high:.4g}; rescale or clip them (do "
            "not remove ImageNet's mean, the encoder does)"
        )
    return array


@functools.lru_cache
def _compiled_draw(modules: autoencoder.AutoencoderModules) -> Callable[..., Tree]:
    return jit.jit_once(functools.partial(autoencoder.init, modules, image_size=2 * PATCH_SIZE))


@functools.lru_cache
def _compiled_encode(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    return jax.jit(lambda variables, x: autoencoder.encode(modules, variables, x).tokens)


@functools.lru_cache
def _compiled_encode_teacher(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    return jax.jit(lambda variables, x: autoencoder.encode_teacher(modules, variables, x).tokens)


@functools.lru_cache
def compiled_decode(
    modules: autoencoder.AutoencoderModules, grid: tuple[int, int]
) -> Callable[..., jax.Array]:
    """Jit of (variables, z [b, n, d]) -> images clipped to [0, 1]."""

    def decode(variables: autoencoder.Variables, z: jax.Array) -> jax.Array:
        return jnp.clip(autoencoder.decode(modules, variables, z, grid), 0.0, 1.0)

    return jax.jit(decode)
