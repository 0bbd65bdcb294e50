"""The encoder families as data: how each is fed, how it is read, and its published sizes.

A model config names a family in `model.encoder` ('dinov3' where the field is absent); its sizes are
the fields of `model.vit`. Imports no jax.

Sources: facebookresearch/dinov3, dinov2, mae and EUPE; transformers (Dinov2Model,
Dinov2WithRegistersModel, SiglipVisionModel, ViTMAEModel); bytetriper/RAE and nanovisionx/RAEv2,
which feed the same networks in ways of their own: latents of `rae_dinov2` and `raev2_dinov2` do
not mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dinosae_jax import names, sizes


class Preprocessing(NamedTuple):
    """From pixels in [0, 1] to an encoder's input.

    Attributes:
      resize: the filter that brings an image to patch/16 of its size, see `models.resize`.
      resize_first: whether mean and deviation are removed after the resize, not before.
      mean: of each channel.
      std: standard deviation of each channel.
    """

    resize: names.Resize = "bicubic_antialias"
    resize_first: bool = True
    mean: tuple[float, ...] = names.IMAGENET_MEAN
    std: tuple[float, ...] = names.IMAGENET_STD


class Family(NamedTuple):
    """One family of encoders.

    Attributes:
      kind: of `weights_conversion`, whose key map reads its files.
      vit: the fields of `VisionTransformer` that all its sizes share, where they differ from
        DINOv3's: prefix tokens, positions and their resizing, norms, layers.
      preprocessing: of its images.
      native: side in pixels of the images that it was trained on.
    """

    kind: str
    vit: Mapping[str, Any]
    preprocessing: Preprocessing
    native: int


_PLAIN = {"final_norm": "plain"}
_DINOV2 = {
    "patch_size": 14,
    "num_storage_tokens": 4,
    "positions": "learned",
    "table_side": 37,
    "norm_eps": 1e-6,
}
_SIGLIP2 = {
    "class_token": False,
    "num_storage_tokens": 0,
    "positions": "learned",
    "table_side": 16,
    "table_resize": "bicubic",
    "layer_scale": False,
    "ffn_layer": "mlp_tanh",
    "norm_eps": 1e-6,
}
_MAE = {
    "num_storage_tokens": 0,
    "positions": "sincos",
    "table_side": 14,
    "table_resize": "bicubic",
    "layer_scale": False,
    "norm_eps": 1e-12,
}
_IMAGENET = Preprocessing()
_HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
_RAEV2_BILINEAR = Preprocessing("bilinear_antialias")
_RAEV2 = {**_PLAIN, "final_norm_eps": 1e-5}

FAMILIES: dict[names.Encoder, Family] = {
    "dinov3": Family("dinov3", {}, _IMAGENET, 256),
    "dinov2": Family("dinov2", _DINOV2, _IMAGENET, 518),
    "siglip2": Family("siglip2", _SIGLIP2, _HALF, 256),
    "mae": Family("mae", _MAE, _IMAGENET, 224),
    "eupe": Family("eupe", {}, _IMAGENET, 256),
    "rae_dinov2": Family("dinov2", _DINOV2 | _PLAIN, Preprocessing("bicubic"), 224),
    "rae_siglip2": Family("siglip2", _SIGLIP2 | _PLAIN, _HALF._replace(resize="bicubic"), 256),
    "rae_mae": Family("mae", _MAE | _PLAIN, Preprocessing("bicubic"), 256),
    "raev2_dinov3": Family("dinov3", _RAEV2 | {"token_mean": True}, _RAEV2_BILINEAR, 256),
    "raev2_dinov2": Family("dinov2", _DINOV2 | _RAEV2, Preprocessing("bicubic", False), 224),
    "raev2_siglip2": Family("siglip2", _SIGLIP2, Preprocessing("bicubic", False), 256),
    "raev2_eupe": Family("eupe", _RAEV2 | {"layer_sum": True}, _RAEV2_BILINEAR, 256),
}


def family(model: Mapping[str, Any]) -> Family:
    """The family that a model config names.

    Raises:
      ValueError: for an unknown name.
    """
    name = model.get("encoder") or "dinov3"
    if name not in FAMILIES:
        raise ValueError(
            f"model.encoder is one of {', '.join(FAMILIES)}; got {name!r}; choose one of them"
        )
    return FAMILIES[name]


def _size(width: int, depth: int, heads: int, hidden: int = 0) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "ffn_hidden": hidden or 4 * width,
    }


_SMALL, _BASE, _LARGE = _size(384, 12, 6), _size(768, 12, 12), _size(1024, 24, 16)
_NO_REGISTERS = {"num_storage_tokens": 0, "table_resize": "bicubic"}
_GIANT = _size(1536, 40, 24, 4096) | {"ffn_layer": "swiglu_fused"}
_DINOV2_SIZES = {"s": _SMALL, "b": _BASE, "l": _LARGE, "g": _GIANT}
_SEVEN_LAYERS = {"layers": (11, 13, 15, 17, 19, 21, 23)}

NETWORKS: dict[str, tuple[names.Encoder, Mapping[str, Any]]] = {
    **{name: ("dinov3", size) for name, size in sizes.VIT.items()},
    **{f"dinov2_vit{s}14_reg": ("dinov2", size) for s, size in _DINOV2_SIZES.items()},
    **{f"dinov2_vit{s}14": ("dinov2", size | _NO_REGISTERS) for s, size in _DINOV2_SIZES.items()},
    "webssl_300m": ("dinov2", _LARGE | _NO_REGISTERS | {"table_side": 16}),
    "siglip2_vitb16": ("siglip2", _BASE),
    "siglip2_vitl16": ("siglip2", _LARGE),
    "siglip2_so400m16": ("siglip2", _size(1152, 27, 16, 4304)),
    "mae_vitb16": ("mae", _BASE),
    "eupe_vitt16": ("eupe", _size(192, 12, 3)),
    "eupe_vits16": ("eupe", _SMALL),
    "eupe_vitb16": ("eupe", _BASE),
    **{f"rae_dinov2_vit{s}14_reg": ("rae_dinov2", _DINOV2_SIZES[s]) for s in "sbl"},
    "rae_siglip2_vitb16": ("rae_siglip2", _BASE),
    "rae_mae_vitb16": ("rae_mae", _BASE),
    "raev2_dinov3_vitl16_k7": ("raev2_dinov3", sizes.VIT["dinov3_vitl16"] | _SEVEN_LAYERS),
    "raev2_dinov2_vitb14_reg": ("raev2_dinov2", _BASE),
    "raev2_siglip2_vitb16": ("raev2_siglip2", _BASE),
    "raev2_eupe_vitb16": ("raev2_eupe", _BASE),
}
"""Published network -> its family, and the fields of `VisionTransformer` that make its size.

Patch 14 or 16 is in the name; `_reg` has register tokens. WebSSL is DINOv2's code with another
table.
"""

DINOV3: dict[str, Any] = {
    "ffn_layer": "mlp",
    "qkv_bias": True,
    "num_storage_tokens": 4,
    "patch_size": 16,
    "class_token": True,
    "class_position": True,
    "positions": "rope",
    "table_side": 0,
    "table_resize": "bicubic_antialias",
    "layer_scale": True,
    "norm_eps": 1e-5,
    "final_norm": "affine",
    "final_norm_eps": 0.0,
    "layers": (),
    "layer_sum": False,
    "token_mean": False,
}
"""The values of the fields that a config of `model.vit` leaves out."""

READING = ("final_norm", "final_norm_eps", "layers", "layer_sum", "token_mean", "table_resize")
"""The fields that say how an encoder is read; the weights of all readings are the same."""


def conversion(role: str, model: Mapping[str, Any]) -> names.Conversion:
    """How the weights of a frozen network of a model are converted.

    Args:
      role: a key of `names.CONVERSIONS`.
      model: the model config.
    """
    kind = family(model).kind if role == "vit" else ""
    return names.ENCODER_CONVERSIONS.get(kind, names.CONVERSIONS[role])


def reading(model: Mapping[str, Any]) -> str:
    """How a model reads which encoder, in words to compare: 'siglip2 layers=(3, 8)'; '' for DINOv3.

    Two models with the same weights and another reading have other latents.
    """
    found = family(model)
    own = {**DINOV3, **found.vit}
    vit = model["vit"]
    values = {name: _hashable(vit.get(name, DINOV3[name])) for name in READING}
    changed = [f"{name}={value}" for name, value in values.items() if value != own[name]]
    name = model.get("encoder") or "dinov3"
    return " ".join([name, *changed]) if changed or name != "dinov3" else ""


def _hashable(value: Any) -> Any:
    """A list of JSON as the tuple that it was."""
    return tuple(value) if isinstance(value, list) else value


def run_depth(vit: Mapping[str, Any]) -> int:
    """Blocks that a config of `model.vit` computes: up to the last of `layers`."""
    layers = vit.get("layers") or ()
    return layers[-1] + 1 if layers else vit["depth"]


def vit_fields(network: str) -> dict[str, Any]:
    """The fields of `model.vit` for a published network, those with DINOv3's values left out.

    What is left out is set to DINOv3's value where a config holds another.
    """
    name, size = NETWORKS[network]
    return {**FAMILIES[name].vit, **size}
