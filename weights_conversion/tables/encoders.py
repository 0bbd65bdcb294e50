"""DINOv2, SigLIP2 and MAE in the names of Hugging Face (before and since 5.0), facebook and timm.

Facts: transformers Dinov2Model, Dinov2WithRegistersModel, SiglipVisionModel, ViTMAEModel and their
conversion_mapping.py; state dicts of facebookresearch/dinov2 and mae; timm's vision_transformer.py.
Facebook and timm name the blocks as we do. What the keys do not tell comes from the family
(`dinosae_jax.encoders`).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from dinosae_jax.encoders import FAMILIES
from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables.keys import UnknownLayoutError, count, has, measure

Shapes = dict[str, Shape]
TOKENS = ("cls_token", "storage_tokens", "mask_token")
KINDS = {name: FAMILIES[name] for name in ("dinov2", "siglip2", "mae")}  # type: ignore[index]
HEADS = {1152: 16}  # published widths whose heads are not 64 wide


_QKV_OLD = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_QKV = tuple(f"attention.{name}_proj" for name in "qkv")


class Names(NamedTuple):
    """How a layout names the parts of a block, below the block.

    Attributes:
      norms: the two norms.
      qkv: the three projections.
      out: the projection after attention.
      fc: the two layers of the feed-forward network.
      gated: the same of a gated one: the two halves, or both in one, and the last.
      scales: the two LayerScales.
    """

    norms: tuple[str, str] = ("norm1", "norm2")
    qkv: tuple[str, ...] = _QKV_OLD
    out: str = "attention.output.dense"
    fc: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gated: tuple[str, ...] = ("mlp.weights_in", "mlp.weights_out")
    scales: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")


_BERT = ("layernorm_before", "layernorm_after")
DINOV2 = Names()
DINOV2_5 = Names(
    qkv=_QKV,
    out="attention.o_proj",
    gated=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
UP_DOWN_5 = DINOV2_5._replace(fc=("mlp.up_proj", "mlp.down_proj"))
SIGLIP = Names(
    norms=("layer_norm1", "layer_norm2"),
    qkv=tuple(f"self_attn.{x}_proj" for x in "qkv"),
    out="self_attn.out_proj",
)
MAE = Names(norms=_BERT, fc=("intermediate.dense", "output.dense"))  # and RAE's decoder
MAE_5 = Names(norms=_BERT, qkv=_QKV, out="attention.o_proj")


def block_rows(ours: str, theirs: str, names: Names) -> dict[str, Row]:
    """Rows of a stack of blocks, such as "vit/blocks", named `theirs` with {i}."""
    *halves, last = names.gated

    def joined(parts: Any, leaf: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.{part}.{leaf}" for part in parts)

    rows: dict[str, Row] = {ours: theirs}
    for i in (1, 2):
        rows[f"{ours}/norm{i}"] = f"{theirs}.{names.norms[i - 1]}"
        rows[f"{ours}/mlp/fc{i}"] = f"{theirs}.{names.fc[i - 1]}"
        rows[f"{ours}/ls{i}/gamma"] = f"{theirs}.{names.scales[i - 1]}"
    for leaf, name in (("kernel", "weight"), ("bias", "bias")):
        rows[f"{ours}/attn/qkv/{leaf}"] = joined(names.qkv, name)
        rows[f"{ours}/mlp/w12/{leaf}"] = joined(halves, name)
    return rows | {
        f"{ours}/attn/proj": f"{theirs}.{names.out}",
        f"{ours}/mlp/w3": f"{theirs}.{last}",
    }


def dinov2(shapes: Shapes, prefix: str = "") -> Layout:
    """DINOv2 with or without registers, and WebSSL."""
    if has(shapes, rf"^{re.escape(prefix)}embeddings\."):
        newer = has(shapes, r"attention\.q_proj\.")
        # diffusers, which holds an older class, saves the new names of attention with fc1 and fc2.
        names = (UP_DOWN_5 if has(shapes, r"mlp\.up_proj\.") else DINOV2_5) if newer else DINOV2
        config = _config(shapes, "dinov2", prefix, f"{prefix}encoder.layer.", names)
        if not config["num_storage_tokens"]:
            config["table_resize"] = "bicubic"
        rows = _embeddings(prefix) | {"vit/storage_tokens": f"{prefix}embeddings.register_tokens"}
        rows |= block_rows("vit/blocks", f"{prefix}encoder.layer.{{i}}", names)
        return _layout("dinov2", "huggingface_5" if newer else "huggingface", config, rows)
    config = _plain_config(shapes, "dinov2")
    is_timm = "mask_token" not in shapes
    if is_timm:
        rows = _PLAIN | {
            "vit/storage_tokens": "reg_token",
            "vit/blocks/mlp/w12": "blocks.{i}.mlp.fc1",
            "vit/blocks/mlp/w3": "blocks.{i}.mlp.fc2",
        }
        return _layout("dinov2", "timm", config, rows)
    if not config["num_storage_tokens"]:
        config["table_resize"] = "bicubic_offset"
    return _layout("dinov2", "facebook", config, _PLAIN | {"vit/storage_tokens": "register_tokens"})


def siglip2(shapes: Shapes, prefix: str = "") -> Layout:
    """The vision tower of SigLIP and SigLIP2 at a fixed resolution, without its pooling head."""
    if not has(shapes, rf"^{re.escape(prefix)}embeddings\."):
        buffers: dict[str, Shape | None] = {r"attn_pool\..*": None}
        return _layout("siglip2", "timm", _plain_config(shapes, "siglip2"), _PLAIN, buffers)
    config = _config(shapes, "siglip2", prefix, f"{prefix}encoder.layers.", SIGLIP)
    rows: dict[str, Row] = {
        "vit/patch_embed/proj": f"{prefix}embeddings.patch_embedding",
        "vit/pos_embed": f"{prefix}embeddings.position_embedding.weight",
        "vit/norm": f"{prefix}post_layernorm",
        **block_rows("vit/blocks", f"{prefix}encoder.layers.{{i}}", SIGLIP),
    }
    before = re.escape(prefix)
    buffers = {before + r"head\..*": None, before + r"embeddings\.position_ids": None}
    return _layout("siglip2", "huggingface", config, rows, buffers)


def mae(shapes: Shapes, prefix: str = "") -> Layout:
    """The encoder of MAE; its decoder, if the file has one, is not read."""
    if not has(shapes, rf"^{re.escape(prefix)}embeddings\."):
        config = _plain_config(shapes, "mae") | {"norm_eps": 1e-6}  # facebook's and timm's
        buffers: dict[str, Shape | None] = {r"decoder_.*": None, r"mask_token": None}
        return _layout("mae", "facebook", config, _PLAIN, buffers)
    newer = has(shapes, rf"^{re.escape(prefix)}layers\.")
    names, block = (MAE_5, "layers") if newer else (MAE, "encoder.layer")
    config = _config(shapes, "mae", prefix, f"{prefix}{block}.", names)
    rows = _embeddings(prefix) | block_rows("vit/blocks", f"{prefix}{block}.{{i}}", names)
    return _layout("mae", "huggingface_5" if newer else "huggingface", config, rows)


_PLAIN: dict[str, Row] = {"vit": "", "vit/blocks": "blocks.{i}"}


def _embeddings(prefix: str) -> dict[str, Row]:
    return {
        "vit/cls_token": f"{prefix}embeddings.cls_token",
        "vit/mask_token": f"{prefix}embeddings.mask_token",
        "vit/pos_embed": f"{prefix}embeddings.position_embeddings",
        "vit/patch_embed/proj": f"{prefix}embeddings.patch_embeddings.projection",
        "vit/norm": f"{prefix}layernorm",
    }


def _layout(
    kind: str,
    name: str,
    config: dict[str, Any],
    rows: dict[str, Row],
    buffers: dict[str, Shape | None] | None = None,
) -> Layout:
    tokens: dict[str, Row] = {f"vit/{token}": token for token in TOKENS}
    return Layout(
        name,
        {"vit": config},
        tokens | rows,
        buffers=buffers or {},
        derive=_derived,
        model={"encoder": kind},
    )


def _derived(path: str, shape: Shape) -> np.ndarray | None:
    """SigLIP2, MAE and timm have no mask token."""
    return np.zeros(shape, np.float32) if path == "vit/mask_token" else None


def _config(shapes: Shapes, kind: str, prefix: str, block: str, names: Names) -> dict[str, Any]:
    """The configuration of a Hugging Face state dict."""
    before, blocks = re.escape(prefix), re.escape(block)
    kernel = {before + r"embeddings\.patch_embeddings?(\.projection)?\.weight": "---n"}
    width = measure(
        shapes,
        kind,
        {
            before + r"embeddings\.patch_embeddings?(\.projection)?\.(bias)": "n",
            before + r"embeddings\.patch_embeddings?(\.projection)?\.(weight)": "n---",
            before + r"(post_layernorm|layernorm)\.(weight|bias)": "n",
        },
    )
    table = {
        before + r"embeddings\.position_embeddings": "-n-",
        before + r"embeddings\.position_embedding\.weight": "n-",
    }
    gated = has(shapes, rf"^{blocks}\d+\.{re.escape(names.gated[0])}\.")
    return _family_config(
        shapes,
        kind,
        width=width,
        depth=count(shapes, rf"{blocks}(\d+)\."),
        patch=measure(shapes, kind, kernel, KINDS[kind].vit.get("patch_size", 16)),
        rows=measure(shapes, kind, table),
        registers=shapes.get(f"{prefix}embeddings.register_tokens", (1, 0, width)),
        hidden=_hidden(shapes, kind, blocks, names, width, gated),
        gated=gated,
    )


def _hidden(shapes: Shapes, kind: str, blocks: str, names: Names, width: int, gated: bool) -> int:
    """The hidden width: from the layer that leads back, whose input it is."""
    last = names.gated[-1] if gated else names.fc[1]
    first = names.gated[0] if gated else names.fc[0]
    fused = 2 if gated and len(names.gated) == 2 else 1
    places = {rf"{blocks}\d+\.{re.escape(last)}\.weight": "-n"}
    if fused == 1:
        places |= {
            rf"{blocks}\d+\.{re.escape(first)}\.weight": "n-",
            rf"{blocks}\d+\.{re.escape(first)}\.bias": "n",
        }
    return measure(shapes, kind, places, 4 * width)


def _plain_config(shapes: Shapes, kind: str) -> dict[str, Any]:
    """The configuration of a state dict in facebook's or timm's names."""
    kernel = r"patch_embed\.proj\.weight"
    width = measure(
        shapes,
        kind,
        {"cls_token": "--n", kernel: "n---", r"norm\.(weight|bias)": "n", "pos_embed": "--n"},
    )
    gated = has(shapes, r"^blocks\.\d+\.mlp\.w12\.")
    found = measure(shapes, kind, {r"blocks\.\d+\.mlp\.(fc2|w3)\.weight": "-n"}, 4 * width)
    first = measure(shapes, kind, {r"blocks\.\d+\.mlp\.(fc1|w12)\.weight": "n-"}, found)
    registers = shapes.get("register_tokens", shapes.get("reg_token", (1, 0, width)))
    return _family_config(
        shapes,
        kind,
        width=width,
        depth=count(shapes, r"blocks\.(\d+)\."),
        patch=measure(shapes, kind, {kernel: "---n"}, KINDS[kind].vit.get("patch_size", 16)),
        rows=measure(shapes, kind, {"pos_embed": "-n-"}),
        registers=registers,
        hidden=found,
        gated=gated or first == 2 * found,
    )


def _check_family(shapes: Shapes, kind: str, family: dict[str, Any]) -> None:
    """Refuses the state dict of another encoder by what it has and the kind lacks, or reversed."""
    for what, pattern, wanted in (
        ("LayerScale", r"layer_scale1|\bls1\b", family.get("layer_scale", True)),
        ("a class token", r"\bcls_token$", family.get("class_token", True)),
    ):
        if has(shapes, pattern) != wanted:
            raise UnknownLayoutError(
                f"a {kind} state dict has {what if wanted else f'no {what}'}; got one "
                f"{'without' if wanted else 'with it'}, of another encoder; check --kind"
            )


def _family_config(
    shapes: Shapes,
    kind: str,
    *,
    width: int,
    depth: int,
    patch: int,
    rows: int,
    registers: Shape,
    hidden: int,
    gated: bool,
) -> dict[str, Any]:
    family = dict(KINDS[kind].vit)
    _check_family(shapes, kind, family)
    has_class = family.get("class_token", True)
    side = math.isqrt(rows)
    in_table = bool(has_class and side**2 != rows)  # timm leaves the class token's position out
    if in_table:
        side = math.isqrt(rows - 1)
    if side**2 + in_table != rows:
        raise UnknownLayoutError(
            f"a {kind} table of positions has a square grid; got {rows} rows; check --kind and "
            "--container"
        )
    found = family | {
        "embed_dim": width,
        "depth": depth,
        "num_heads": HEADS.get(width, max(width // 64, 1)),
        "ffn_hidden": hidden,
        "patch_size": patch,
        "table_side": side,
        "num_storage_tokens": registers[1] if len(registers) == 3 else 0,
    }
    if gated:
        found["ffn_layer"] = "swiglu_fused"
    if has_class and not in_table:
        found["class_position"] = False
    return found
