"""The convolutional decoder: DINO-SAE's DCAE_Decoder, and the DC-AE decoders it descends from.

Stages are named in DINO-SAE's order of execution, `stages_0` has the lowest resolution; DC-AE's
own checkpoints count the other way round. `width_list`, `depth_list` and the other lists are
indexed as in both originals: entry 0 belongs to the highest resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from dinosae_jax.models.decoder_blocks import (
    EVIT_SCALES,
    UPSAMPLERS,
    Duplicate,
    EViTBlock,
    Factory,
    InterpolateConv,
    ResBlock,
    Residual,
    ShuffledResidual,
)
from dinosae_jax.models.layers import ACTIVATIONS, ConvLayer, apply_norm

Array = jax.Array


class Stage(nn.Module):
    """The modules of one resolution, in sequence; `op_list` holds a factory for each."""

    op_list: tuple[Factory, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, make in enumerate(self.op_list):
            x = make(name=f"op_list_{i}")(x, train)
        return x


class ProjectOut(nn.Module):
    """Norm and activation, and the last convolution, as two steps.

    Attributes:
      out_channels: channels of the image.
      norm: kind of norm, or None.
      act: activation, or None.
      upsampler: None, or the upsampling block that takes the convolution's place.
      dtype: of the convolution.
    """

    out_channels: int
    norm: str | None
    act: str | None
    upsampler: str | None
    dtype: Dtype

    def setup(self) -> None:
        layer: Any = ConvLayer if self.upsampler is None else UPSAMPLERS[self.upsampler]
        name = f"op_list_{(self.norm is not None) + (self.act is not None)}"
        self.last = layer(self.out_channels, dtype=self.dtype, name=name)

    @nn.compact
    def features(self, x: Array, train: bool) -> Array:
        """Input of the last layer: [b, h, w, c] -> same shape."""
        y = ACTIVATIONS[self.act](apply_norm(self.norm, x, train, name="op_list_0"))
        return y.astype(self.dtype)

    def head(self, features: Array) -> Array:
        """Image of the features, [b, h, w, c] or twice as high and wide, float32."""
        return self.last(features).astype(jnp.float32)

    def kernel_path(self) -> tuple[str, ...]:
        """Path of the convolution's kernel below this module."""
        name = f"op_list_{(self.norm is not None) + (self.act is not None)}"
        return (
            (name, "conv", "kernel") if self.upsampler is None else (name, "conv", "conv", "kernel")
        )


class Decoder(nn.Module):
    """Decoder from a grid of latents to an image 2^(stages-1) times as large.

    The attributes are the fields of the originals' DecoderConfig. The output is not clipped.

    Attributes:
      latent_channels: width of the latents.
      width_list: channels of each stage, highest resolution first.
      depth_list: blocks of each stage; 0 only for the first entry, and then the last upsampling
        happens in the output layer.
      in_channels: channels of the image.
      in_shortcut: None or "duplicating", around the first convolution.
      block_type: "ResBlock", "EViT_GLU" or "EViTS5_GLU", one or one per stage.
      norm: "trms2d" (one statistic per image; nothing in EViT blocks), "pixel_trms2d" (DC-AE's),
        "bn2d" or None, one or one per stage.
      act: "relu", "silu", "tanh", "sigmoid" or None, one or one per stage.
      upsample_block_type: "ConvPixelShuffle" or "InterpolateConv".
      upsample_match_channel: whether the upsampling block changes the width; False needs equal
        widths.
      upsample_shortcut: None, "duplicating" or "InterpolateConv".
      out_norm: as norm, in front of the last convolution.
      out_act: activation in front of the last convolution.
      dtype: of the convolutions and of what is stored between them; norms, attention and sums are
        computed in float32.
    """

    latent_channels: int
    width_list: Sequence[int]
    depth_list: Sequence[int]
    in_channels: int = 3
    in_shortcut: str | None = "duplicating"
    block_type: str | Sequence[str] = "ResBlock"
    norm: str | Sequence[str] | None = "trms2d"
    act: str | Sequence[str | None] | None = "silu"
    upsample_block_type: str = "ConvPixelShuffle"
    upsample_match_channel: bool = True
    upsample_shortcut: str | None = "duplicating"
    out_norm: str | None = "trms2d"
    out_act: str | None = "relu"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self._check()
        conv = functools.partial(ConvLayer, self.width_list[-1], dtype=self.dtype)
        duplicate = functools.partial(Duplicate, self.width_list[-1], factor=1)
        self.project_in = Residual(conv, duplicate) if self.in_shortcut else conv()
        self.stages = [Stage(self._stage_modules(i)) for i in self._indices()]
        self.project_out = self._project_out()

    def __call__(self, z: Array, train: bool = False) -> Array:
        """Image of the latents: `head(features(z))`.

        Args:
          z: [b, h, w, latent_channels] float32.
          train: whether batch norm uses and updates the statistics of the batch.

        Returns:
          [b, f*h, f*w, in_channels] float32, f = 2^(stages-1), as the network puts it out.
        """
        return self.head(self.features(z, train))

    def trunk(self, z: Array, train: bool = False) -> dict[str, Array]:
        """Outputs of all layers before the output layer, [b, h', w', c] each, in their order.

        The keys are project_in, stage0 (lowest resolution), stage1 and so on.
        """
        outputs = {"project_in": self.project_in(z, train)}
        for i, stage in enumerate(self.stages):
            outputs[f"stage{i}"] = stage(outputs[f"stage{i - 1}" if i else "project_in"], train)
        return outputs

    def features(self, z: Array, train: bool = False) -> Array:
        """Input of the last layer, whose kernel is at `last_kernel_path`, [b, h', w', c]."""
        return self.project_out.features(list(self.trunk(z, train).values())[-1], train)

    def head(self, features: Array) -> Array:
        """The last layer alone: [b, h', w', c] -> [b, f*h, f*w, in_channels] float32."""
        return self.project_out.head(features)

    @property
    def last_kernel_path(self) -> tuple[str, ...]:
        """Path of the last convolution's kernel in the parameters."""
        return ("project_out", *self._project_out(parent=None).kernel_path())

    def _indices(self) -> range:
        """Indices into the lists, in the order of execution."""
        return range(len(self.width_list) - 1, -1, -1)

    def _per_stage(self, value: Any) -> tuple[Any, ...]:
        return (value,) * len(self.width_list) if value is None or isinstance(value, str) else value

    def _stage_modules(self, i: int) -> tuple[Factory, ...]:
        """Factories of stage i's modules: an upsampling block except in the first, then blocks."""
        if self.depth_list[i] == 0:
            return ()
        block_type = self._per_stage(self.block_type)[i]
        norm, act = self._per_stage(self.norm)[i], self._per_stage(self.act)[i]
        if block_type == "ResBlock":
            main = functools.partial(ResBlock, norm, act, self.dtype)
            block: Factory = functools.partial(Residual, main)
        else:
            block = functools.partial(EViTBlock, EVIT_SCALES[block_type], norm, act, self.dtype)
        up = () if i == len(self.width_list) - 1 else (self._upsampler(self.width_list[i]),)
        return (*up, *[block] * self.depth_list[i])

    def _upsampler(self, width: int) -> Factory:
        main = functools.partial(UPSAMPLERS[self.upsample_block_type], width, self.dtype)
        kinds = (self.upsample_block_type, self.upsample_shortcut)
        if self.upsample_shortcut is None:
            return main
        if kinds == ("ConvPixelShuffle", "duplicating"):
            return functools.partial(ShuffledResidual, width, self.dtype)
        if self.upsample_shortcut == "duplicating":
            shortcut: Factory = functools.partial(Duplicate, width, factor=2)
        else:
            shortcut = functools.partial(InterpolateConv, width, self.dtype)
        return functools.partial(Residual, main, shortcut)

    def _project_out(self, **kwargs: Any) -> ProjectOut:
        upsampler = self.upsample_block_type if self.depth_list[0] == 0 else None
        return ProjectOut(
            self.in_channels, self.out_norm, self.out_act, upsampler, self.dtype, **kwargs
        )

    def _check(self) -> None:
        """Raises ValueError for a configuration that cannot be built."""
        stages = len(self.width_list)
        for name in ("depth_list", "block_type", "norm", "act"):
            if len(self._per_stage(getattr(self, name))) != stages:
                raise ValueError(
                    f"{name} needs one entry for each of the {stages} stages in width_list; got "
                    f"{getattr(self, name)}; give {stages} entries"
                )
        if min(self.depth_list[1:], default=1) < 1:
            raise ValueError(
                f"depth_list may be 0 for the first entry only; got {tuple(self.depth_list)}; "
                "give every other stage at least one block"
            )
        if not self.upsample_match_channel and len(set(self.width_list)) > 1:
            raise ValueError(
                "upsample_match_channel=False needs equal widths; got width_list "
                f"{tuple(self.width_list)}; leave it at True"
            )
        for name, allowed in _CHOICES.items():
            for value in self._per_stage(getattr(self, name)):
                if value not in allowed:
                    raise ValueError(
                        f"{name} is one of {', '.join(map(str, allowed))}; got {value!r}; "
                        "choose one of these"
                    )


_BLOCKS = ("ResBlock", *EVIT_SCALES)
_NORMS = ("trms2d", "pixel_trms2d", "bn2d", "ln2d", None)
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "in_shortcut": (None, "duplicating"),
    "block_type": _BLOCKS,
    "norm": _NORMS,
    "act": tuple(ACTIVATIONS),
    "upsample_block_type": tuple(UPSAMPLERS),
    "upsample_shortcut": (None, "duplicating", "InterpolateConv"),
    "out_norm": _NORMS,
    "out_act": tuple(ACTIVATIONS),
}
