"""DINOv3 vision transformers: facebook's .pth, Hugging Face's two prefixes, timm's two forms.

Facts: facebookresearch/dinov3 state dicts; transformers DINOv3ViTModel (published files have
`layer.i`, newer versions save `model.layer.i`); timm vit_*_dinov3 and vit_*_dinov3_qkvb.
"""

from typing import Any

import ml_dtypes
import numpy as np

from weights_conversion.rules import Layout, Row, Shape
from weights_conversion.tables.keys import count, shape_of

Shapes = dict[str, Shape]

# Kept as stored, and not read by the model: the key bias's mask is applied when weights are
# loaded, the norm of local crops is for training alone.
FACEBOOK_BUFFERS = (r"blocks\.\d+\.attn\.qkv\.bias_mask", r"local_cls_norm\.(weight|bias)")

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
    if any(key.startswith("embeddings.") for key in shapes):
        return _hugging_face(shapes)
    if "reg_token" in shapes or "blocks.0.gamma_1" in shapes:
        return _timm(shapes)
    return facebook(shapes)


def facebook(shapes: Shapes, prefix: str = "", patch_embed: str | None = None) -> Layout:
    """The table of facebook's layout.

    Args:
      shapes: Key -> shape.
      prefix: What stands before every key, with its dot.
      patch_embed: Prefix of the patch convolution, without a dot, where it is another.

    Returns:
      The layout.
    """
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    blocks = f"{prefix}blocks.{{i}}"
    return Layout(
        name="facebook",
        config={"vit": _facebook_config(own, shapes, patch_embed)},
        rows={
            "vit": prefix.rstrip("."),
            "vit/blocks": blocks,
            "vit/patch_embed": f"{prefix}patch_embed" if patch_embed is None else patch_embed,
        },
        buffers=tuple(prefix.replace(".", r"\.") + key for key in FACEBOOK_BUFFERS),
    )


def _facebook_config(own: Shapes, shapes: Shapes, patch_embed: str | None) -> dict[str, Any]:
    ffn = "mlp.w1" if "blocks.0.mlp.w1.weight" in own else "mlp.fc1"
    width = shape_of(own, "cls_token", "DINOv3")[-1]
    patch = shapes.get(f"{patch_embed or 'patch_embed'}.proj.weight", (0, 0, 16, 16))
    periods = own.get("rope_embed.periods")
    return {
        "embed_dim": width,
        "depth": count(own, r"blocks\.(\d+)\."),
        "num_heads": width // (4 * periods[0]) if periods else _heads(width),
        "ffn_hidden": shape_of(own, f"blocks.0.{ffn}.weight", "DINOv3")[0],
        "ffn_layer": "swiglu" if ffn == "mlp.w1" else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in own,
        "num_storage_tokens": own.get("storage_tokens", (1, 0))[1],
        "patch_size": patch[-1],
    }


def _timm(shapes: Shapes) -> Layout:
    width = shape_of(shapes, "cls_token", "timm DINOv3")[-1]
    gated = "blocks.0.mlp.fc1_g.weight" in shapes
    first = "blocks.0.mlp.fc1_g.weight" if gated else "blocks.0.mlp.fc1.weight"
    config = {
        "embed_dim": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "num_heads": _heads(width),
        "ffn_hidden": shape_of(shapes, first, "timm DINOv3")[0],
        "ffn_layer": "swiglu" if gated else "mlp",
        "qkv_bias": "blocks.0.attn.q_bias" in shapes,
        "num_storage_tokens": shapes.get("reg_token", (1, 0))[1],
        "patch_size": shape_of(shapes, "patch_embed.proj.weight", "timm DINOv3")[-1],
    }
    return Layout("timm", {"vit": config}, TIMM, derive=derived)


def _hugging_face(shapes: Shapes) -> Layout:
    newer = any(key.startswith("model.layer.") for key in shapes)
    block = "model.layer.{i}" if newer else "layer.{i}"
    first = block.format(i=0)
    gated = f"{first}.mlp.gate_proj.weight" in shapes
    width = shape_of(shapes, "embeddings.cls_token", "Hugging Face DINOv3")[-1]
    config = {
        "embed_dim": width,
        "depth": count(shapes, r"(?:model\.)?layer\.(\d+)\."),
        "num_heads": _heads(width),
        "ffn_hidden": shape_of(shapes, f"{first}.mlp.up_proj.weight", "Hugging Face DINOv3")[0],
        "ffn_layer": "swiglu" if gated else "mlp",
        "qkv_bias": f"{first}.attention.q_proj.bias" in shapes,
        "num_storage_tokens": shapes.get("embeddings.register_tokens", (1, 0))[1],
        "patch_size": shape_of(shapes, "embeddings.patch_embeddings.weight", "DINOv3")[-1],
    }
    rows = _hugging_face_rows(block, f"{first}.attention.k_proj.bias" in shapes)
    name = "huggingface_model_layer" if newer else "huggingface"
    return Layout(name, {"vit": config}, rows, derive=derived)


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


def derived(path: str, shape: Shape) -> np.ndarray | None:
    """What Hugging Face and timm do not store: float32 RoPE periods; timm has no mask token."""
    if path == "vit/rope_embed/periods":
        exponents = np.arange(shape[0], dtype=np.float64) / shape[0]
        return (100.0**exponents).astype(np.float32)
    return np.zeros(shape, np.float32) if path == "vit/mask_token" else None


def rounded(path: str, shape: Shape) -> np.ndarray | None:
    """`derived`, with the periods rounded to bfloat16 as in facebook's released files."""
    value = derived(path, shape)
    if value is None or path != "vit/rope_embed/periods":
        return value
    return value.astype(ml_dtypes.bfloat16).astype(np.float32)


def _heads(width: int) -> int:
    """Heads of the published sizes, which these layouts do not tell: 64 wide, in the 7B 128."""
    return width // 128 if width == 4096 else max(width // 64, 1)
