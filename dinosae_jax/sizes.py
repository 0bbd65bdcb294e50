"""The published sizes of every network, as keyword arguments of its class; imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _vit(
    embed_dim: int,
    depth: int,
    num_heads: int,
    ffn_hidden: int,
    ffn: str = "swiglu",
    bias: bool = True,
) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "ffn_layer": ffn,
        "ffn_hidden": ffn_hidden,
        "qkv_bias": bias,
        "num_storage_tokens": 4,
    }


STEM: dict[str, Any] = {"kind": "conv", "embed_dim": 1024, "widths": (64, 128, 256)}
"""Keyword arguments of DINO-SAE's `ConvStem` before ViT-L."""

VIT: dict[str, dict[str, Any]] = {
    "dinov3_vits16": _vit(384, 12, 6, 1536, "mlp"),
    "dinov3_vits16plus": _vit(384, 12, 6, 1536),
    "dinov3_vitb16": _vit(768, 12, 12, 3072, "mlp"),
    "dinov3_vitl16": _vit(1024, 24, 16, 4096, "mlp"),
    "dinov3_vitl16plus": _vit(1024, 24, 16, 4096),
    "dinov3_vith16plus": _vit(1280, 32, 20, 5120),
    "dinov3_vit7b16": _vit(4096, 40, 32, 8192, bias=False),
}
"""Keyword arguments of `VisionTransformer` for each constructor of DINOv3's torch hub."""


DINO: dict[str, dict[str, int]] = {
    "S_8": {"patch_size": 8, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "S_16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "B_16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}
"""Keyword arguments of `DinoV1`, the discriminator's trunk."""


LIGHTNING_DIT: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}
"""Keyword arguments of `LightningDiT`; S to XL are also the encoders of `DiTDH`."""


RAE_DECODER: dict[str, dict[str, Any]] = {
    name: {
        "kind": "vit",
        "latent_channels": 768,
        "grid": 16,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "ffn_hidden": 4096 if name == "XL" else 4 * width,
        "patch_size": 16,
    }
    for name, width, depth, heads in (("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
}
"""Keyword arguments of `ViTDecoder` for RAE's decoders at 256 pixels."""


_HEAD = {"hidden_size": 2048, "depth": 2, "num_heads": 16}
DIT_DH: dict[str, dict[str, tuple[int, int]]] = {
    name: {field: (value, _HEAD[field]) for field, value in LIGHTNING_DIT[name].items()}
    for name in ("S", "B", "L", "XL")
}
"""Keyword arguments of `DiTDH`: (encoder, head)."""


def from_dcae(config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Decoder` for the fields of a DC-AE (efficientvit) decoder config.

    DC-AE's "trms2d" is a norm per pixel with a bias, and EViT blocks have it: "pixel_trms2d".

    Args:
      config: fields of efficientvit's DecoderConfig; those left out have its defaults.

    Returns:
      The same fields, with `norm` and `out_norm` in this module's words.
    """

    def rename(norm: Any) -> Any:
        if norm is None or isinstance(norm, str):
            return "pixel_trms2d" if norm == "trms2d" else norm
        return tuple(rename(n) for n in norm)

    norms = {"norm": "trms2d", "out_norm": "trms2d"} | config
    return {**config, "norm": rename(norms["norm"]), "out_norm": rename(norms["out_norm"])}


_WIDTHS, _WIDE = (128, 256, 512, 512, 1024), (128, 256, 512, 1024, 1024)


def _dino_sae(widths: Sequence[int], depths: Sequence[int], **fields: Any) -> dict[str, Any]:
    return {
        "latent_channels": 1024,
        "width_list": tuple(widths),
        "depth_list": tuple(depths),
        "block_type": "ResBlock",
        "norm": "trms2d",
        "act": "silu",
        "in_shortcut": "duplicating",
        "upsample_block_type": "ConvPixelShuffle",
        "upsample_match_channel": True,
        "upsample_shortcut": "duplicating",
        "out_norm": "trms2d",
        "out_act": "relu",
        **fields,
    }


def _evit_from(stages: int, first: int) -> dict[str, Any]:
    """The per-stage lists of DC-AE 1.0: ResBlock up to stage `first`, EViT_GLU from it on."""
    rest = stages - first
    return {
        "block_type": ("ResBlock",) * first + ("EViT_GLU",) * rest,
        "norm": ("bn2d",) * first + ("trms2d",) * rest,
        "act": ("relu",) * first + ("silu",) * rest,
    }


def _dcae(latent_channels: int, depths: Sequence[int], **fields: Any) -> dict[str, Any]:
    widths = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[: len(depths)]
    return from_dcae(
        {
            "latent_channels": latent_channels,
            "width_list": widths,
            "depth_list": tuple(depths),
            **fields,
        }
    )


_NO_IN_SHORTCUT = {"in_shortcut": None, "out_act": "silu"}


_EVIT_UP = {"upsample_block_type": "InterpolateConv"}


DECODER: dict[str, dict[str, Any]] = {
    "A": _dino_sae(_WIDTHS, (2, 2, 2, 2, 2)),
    "A0": _dino_sae(_WIDTHS, (0, 2, 2, 2, 2)),
    "B": _dino_sae(_WIDTHS, (0, 5, 10, 2, 2), **_evit_from(5, 3)),
    "B2": _dino_sae(_WIDE, (0, 5, 10, 2, 2), **_evit_from(5, 3)),
    "C": _dino_sae(_WIDE, (2, 2, 2, 2, 2)),
    "S": _dino_sae(
        _WIDTHS, (3, 3, 3, 3, 3), block_type=("ResBlock",) * 3 + ("EViT_GLU",) * 2, **_EVIT_UP
    ),
    "L": _dino_sae(_WIDTHS, (0, 3, 5, 4, 4), **_NO_IN_SHORTCUT),
    "D": _dino_sae(_WIDTHS, (0, 5, 10, 4, 4), **_NO_IN_SHORTCUT),
    "dc-ae-f32c32-1.0": _dcae(32, (0, 5, 10, 2, 2, 2), **_evit_from(6, 3)),
    "dc-ae-f64c128-1.0": _dcae(128, (0, 5, 10, 2, 2, 2, 2), **_evit_from(7, 3)),
    "dc-ae-f128c512-1.0": _dcae(512, (0, 5, 10, 2, 2, 2, 2, 2), **_evit_from(8, 3)),
    "dc-ae-f32c32-sana": _dcae(
        32, (3,) * 6, block_type=("ResBlock",) * 3 + ("EViTS5_GLU",) * 3, **_EVIT_UP
    ),
    "dc-ae-lite-f32c32-sana-1.1": _dcae(32, (0, 3, 5, 4, 4, 4), out_act="silu"),
    "dc-ae-f32c128": _dcae(128, (0, 5, 10, 4, 4, 4), **_NO_IN_SHORTCUT),
}
"""Keyword arguments of `Decoder`.

A (the default) to D are candidates for DINO-SAE's unpublished configuration, 16 times upsampling
from 1024 channels; the others are the published DC-AE decoders (-in and -mix share one, and so
do versions 1.0 and 1.1 of sana, 1.1 and 1.5 of f32c128).
"""
