"""DINOv3 vision transformers: facebook's .pth, Hugging Face's two prefixes, timm's two forms.

Facts: facebookresearch/dinov3 state dicts; transformers DINOv3ViTModel (published files have
`layer.i`, newer versions save `model.layer.i`); timm vit_*_dinov3 and vit_*_dinov3_qkvb.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables.keys import count, has, measure

Shapes = dict[str, Shape]

PUBLISHED_STORAGE_TOKENS = 4

TIMM: dict[str, Row] = {
    "vit": "",
    "vit/storage_tokens": "reg_token",
    "vit/blocks": "blocks.{i}",
    "vit/blocks/ls1/gamma": "blocks.{i}.gamma_1",
    "vit/blocks/ls2/gamma": "blocks.{i}.gamma_2",
    "vit/blocks/attn/qkv/bias": ("blocks.{i}.attn.q_bias", None, "blocks.{i}.attn.v_bias"),
    "vit/blocks/mlp/w1": "blocks.{i}.mlp.fc1_g",
    "vit/blocks/mlp/w2": "blocks.{i}.mlp.fc1_x",
    "vit/blocks/mlp/w3": "blocks.{i}.mlp.fc2",
}


def layout(shapes: Shapes) -> Layout:
    """Reads layout and configuration off the keys."""
    if has(shapes, r"^embeddings\."):
        return _hugging_face(shapes)
    if "reg_token" in shapes or has(shapes, r"^blocks\.\d+\.gamma_[12]$"):
        return _timm(shapes)
    return facebook(shapes)


def eupe_layout(shapes: Shapes) -> Layout:
    """EUPE, which is DINOv3's code with other weights."""
    return dataclasses.replace(facebook(shapes), model={"encoder": "eupe"})


def facebook(shapes: Shapes, prefix: str = "", patch_embed: str | None = None) -> Layout:
    """The table of facebook's layout.

    Args:
      shapes: Key -> shape.
      prefix: What stands before every key, with its dot.
      patch_embed: Prefix of the patch convolution, without a dot, where it is another.

    Returns:
      The layout.
    """
    own = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
    patch_embed = f"{prefix}patch_embed" if patch_embed is None else patch_embed
    kernel = {re.escape(patch_embed) + r"\.proj\.weight": "---n"}
    config = _config(own, "DINOv3", FACEBOOK_KEYS) | {
        "patch_size": measure(shapes, "DINOv3", kernel, 16),
    }
    period_count = measure(own, "DINOv3", {r"rope_embed\.periods": "n"}, config["embed_dim"])
    if config["embed_dim"] % (4 * period_count) == 0:
        config["num_heads"] = config["embed_dim"] // (4 * period_count)
    # Not read by the model: the key bias's mask is applied when weights are loaded, the norm of
    # local crops is for training alone.
    before = re.escape(prefix)
    buffers: dict[str, Shape | None] = {
        before + r"blocks\.\d+\.attn\.qkv\.bias_mask": (3 * config["embed_dim"],),
        before + r"local_cls_norm\.(weight|bias)": (config["embed_dim"],),
    }
    rows: dict[str, Row] = {
        "vit": prefix.rstrip("."),
        "vit/blocks": f"{prefix}blocks.{{i}}",
        "vit/patch_embed": patch_embed,
    }
    return Layout("facebook", {"vit": config}, rows, buffers=buffers)


class _Keys(NamedTuple):
    """Where a layout tells the configuration: patterns for `measure` and `has`."""

    block: str
    width: dict[str, str]
    gate: str
    hidden: dict[str, str]
    query_bias: str
    storage: str


FACEBOOK_KEYS = _Keys(
    block=r"blocks\.(\d+)\.",
    width={"cls_token": "--n", "mask_token": "-n", r"norm\.(weight|bias)": "n"},
    gate=r"mlp\.w[123]\.",
    hidden={
        r"blocks\.\d+\.mlp\.(fc1|w1|w2)\.weight": "n-",
        r"blocks\.\d+\.mlp\.(fc1|w1|w2)\.bias": "n",
        r"blocks\.\d+\.mlp\.(fc2|w3)\.weight": "-n",
    },
    query_bias=r"attn\.qkv\.bias$",
    storage="storage_tokens",
)
TIMM_KEYS = _Keys(
    block=r"blocks\.(\d+)\.",
    width={"cls_token": "--n", "reg_token": "--n", r"norm\.(weight|bias)": "n"},
    gate=r"mlp\.fc1_[gx]\.",
    hidden={
        r"blocks\.\d+\.mlp\.fc1(_[gx])?\.weight": "n-",
        r"blocks\.\d+\.mlp\.fc1(_[gx])?\.bias": "n",
        r"blocks\.\d+\.mlp\.fc2\.weight": "-n",
    },
    query_bias=r"attn\.[qv]_bias$",
    storage="reg_token",
)
HUGGING_FACE_KEYS = _Keys(
    block=r"(?:model\.)?layer\.(\d+)\.",
    width={r"embeddings\.(cls|mask)_token": "--n", r"norm\.(weight|bias)": "n"},
    gate=r"mlp\.gate_proj\.",
    hidden={
        r".*\.mlp\.(up|gate)_proj\.weight": "n-",
        r".*\.mlp\.(up|gate)_proj\.bias": "n",
        r".*\.mlp\.down_proj\.weight": "-n",
    },
    query_bias=r"attention\.[qv]_proj\.bias$",
    storage="embeddings.register_tokens",
)


def _config(shapes: Shapes, kind: str, keys: _Keys) -> dict[str, Any]:
    width = measure(shapes, kind, keys.width)
    storage = shapes.get(keys.storage, ())
    return {
        "embed_dim": width,
        "depth": count(shapes, keys.block),
        "num_heads": _heads(width),
        "ffn_hidden": measure(shapes, kind, keys.hidden, 4 * width),
        "ffn_layer": "swiglu" if has(shapes, keys.gate) else "mlp",
        "qkv_bias": has(shapes, keys.query_bias),
        # A file without any is more likely to have lost them than to be a model without.
        "num_storage_tokens": storage[1] if len(storage) == 3 else PUBLISHED_STORAGE_TOKENS,
    }


def _timm(shapes: Shapes) -> Layout:
    kind = "timm DINOv3"
    patch = measure(shapes, kind, {r"patch_embed\.proj\.weight": "---n"}, 16)
    config = _config(shapes, kind, TIMM_KEYS) | {"patch_size": patch}
    return Layout("timm", {"vit": config}, TIMM, derive=_timm_derived)


def _hugging_face(shapes: Shapes) -> Layout:
    kind = "Hugging Face DINOv3"
    newer = has(shapes, r"^model\.layer\.")
    patch = measure(shapes, kind, {r"embeddings\.patch_embeddings\.weight": "---n"}, 16)
    config = _config(shapes, kind, HUGGING_FACE_KEYS) | {"patch_size": patch}
    block = "model.layer.{i}" if newer else "layer.{i}"
    rows = _hugging_face_rows(block, has(shapes, r"attention\.k_proj\.bias$"))
    name = "huggingface_model_layer" if newer else "huggingface"
    return Layout(name, {"vit": config}, rows, derive=_derived)


def _hugging_face_rows(block: str, key_bias: bool) -> dict[str, Row]:
    attention = f"{block}.attention"
    k_bias = f"{attention}.k_proj.bias" if key_bias else None
    return {
        "vit": "",
        "vit/cls_token": "embeddings.cls_token",
        "vit/storage_tokens": "embeddings.register_tokens",
        "vit/mask_token": "embeddings.mask_token",
        "vit/patch_embed/proj": "embeddings.patch_embeddings",
        "vit/blocks": block,
        "vit/blocks/attn/qkv/kernel": tuple(f"{attention}.{x}_proj.weight" for x in "qkv"),
        "vit/blocks/attn/qkv/bias": (
            f"{attention}.q_proj.bias",
            k_bias,
            f"{attention}.v_proj.bias",
        ),
        "vit/blocks/attn/proj": f"{attention}.o_proj",
        "vit/blocks/ls1/gamma": f"{block}.layer_scale1.lambda1",
        "vit/blocks/ls2/gamma": f"{block}.layer_scale2.lambda1",
        "vit/blocks/mlp/fc1": f"{block}.mlp.up_proj",
        "vit/blocks/mlp/fc2": f"{block}.mlp.down_proj",
        "vit/blocks/mlp/w1": f"{block}.mlp.gate_proj",
        "vit/blocks/mlp/w2": f"{block}.mlp.up_proj",
        "vit/blocks/mlp/w3": f"{block}.mlp.down_proj",
    }


def _derived(path: str, shape: Shape) -> np.ndarray | None:
    """What Hugging Face and timm do not store: the RoPE periods, here in float32."""
    if path != "vit/rope_embed/periods":
        return None
    exponents = np.arange(shape[0], dtype=np.float64) / shape[0]
    return (100.0**exponents).astype(np.float32)


def _timm_derived(path: str, shape: Shape) -> np.ndarray | None:
    """The same for timm, which has no mask token either."""
    zeros = np.zeros(shape, np.float32)
    return zeros if path == "vit/mask_token" else _derived(path, shape)


def _heads(width: int) -> int:
    """Heads of the published sizes, which these layouts do not tell: 64 wide, in the 7B 128."""
    return width // 128 if width == 4096 else max(width // 64, 1)
