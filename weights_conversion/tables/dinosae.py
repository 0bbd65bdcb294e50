"""The official DINO-SAE state dict, and its stem and decoder alone.

Keys: `dino_model.*` is facebook's ViT with `patch_embed` replaced by the stem, `decoder.*` the
decoder; `TEACHER_ONLY.patch_embed.proj.*` is the ViT's own patch convolution where a file has it.
The decoder's configuration is read off the keys (reference sheet autoencoder.md, section 3.7);
activations leave no trace, so they are DC-AE's habit: relu with batch norm, else silu, relu last.
"""

import re
from typing import Any

from weights_conversion.rules import Layout, Shape
from weights_conversion.tables import dinov3
from weights_conversion.tables.keys import UnknownLayoutError, count, has, shape_of

Shapes = dict[str, Shape]
COUNTERS = r".*\.num_batches_tracked"


def layout(shapes: Shapes) -> Layout:
    """The whole autoencoder: roles stem, vit and decoder."""
    vit = dinov3.facebook(shapes, "dino_model.", "TEACHER_ONLY.patch_embed")
    stem = stem_layout(shapes, "dino_model.patch_embed.")
    decoder = decoder_layout(shapes, "decoder.")
    return Layout(
        "official",
        {**stem.config, **vit.config, **decoder.config},
        {**vit.rows, **stem.rows, **decoder.rows},
        buffers=(*vit.buffers, *decoder.buffers),
        optional=("vit/patch_embed",),
    )


def stem_layout(shapes: Shapes, prefix: str = "") -> Layout:
    """The convolutional stem: `cnn.N.conv.weight`, `cnn.N.norm.weight`."""
    layers = count(shapes, re.escape(prefix) + r"cnn\.(\d+)\.")
    if not layers:
        raise UnknownLayoutError(
            f"there is no stem ({prefix}cnn.*) among the {len(shapes)} keys; check --kind"
        )
    widths = [shape_of(shapes, f"{prefix}cnn.{i}.conv.weight", "stem")[0] for i in range(layers)]
    config = {"stem": {"embed_dim": widths[-1], "widths": widths[:-1]}}
    return Layout("official", config, {"stem": prefix.rstrip(".")})


def decoder_layout(shapes: Shapes, prefix: str = "") -> Layout:
    """The decoder, its stages in DINO-SAE's order (stages.0 is the lowest resolution)."""
    own = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
    config = {"decoder": infer_decoder(own)}
    buffers = (re.escape(prefix) + COUNTERS,)
    return Layout("official", config, {"decoder": prefix.rstrip(".")}, buffers=buffers)


def infer_decoder(own: Shapes) -> dict[str, Any]:
    """Decoder configuration of a state dict in the official order, keys without a prefix.

    Args:
      own: Key -> shape.

    Returns:
      Keyword arguments of `Decoder`.
    """
    in_shortcut = "project_in.main.conv.weight" in own
    first = "project_in.main.conv.weight" if in_shortcut else "project_in.conv.weight"
    top, latent = shape_of(own, first, "decoder")[:2]
    last = f"project_out.op_list.{count(own, r'project_out.op_list.([0-9]+)') - 1}"
    last_up = f"{last}.conv.conv.weight" in own
    outputs = shape_of(
        own, f"{last}.conv.conv.weight" if last_up else f"{last}.conv.weight", "decoder"
    )
    stages = [_stage(own, k, top) for k in range(count(own, r"stages\.(\d+)\."))]
    shuffle = _upsampler(stages) == "ConvPixelShuffle"
    if last_up:  # then the stage of the highest resolution has no keys of its own
        stages.append({"width": outputs[1], "depth": 0, "block": "ResBlock", "norm": "trms2d"})
    stages.reverse()
    norms = [stage["norm"] for stage in stages]
    out_norm = _norm(own, "project_out.op_list.0")
    return {
        "latent_channels": latent,
        "in_channels": outputs[0] // 4 if last_up and shuffle else outputs[0],
        "in_shortcut": "duplicating" if in_shortcut else None,
        "width_list": [stage["width"] for stage in stages],
        "depth_list": [stage["depth"] for stage in stages],
        "block_type": [stage["block"] for stage in stages],
        "norm": norms,
        "act": ["relu" if norm == "bn2d" else "silu" for norm in norms],
        "upsample_block_type": _upsampler(stages),
        "upsample_shortcut": _shortcut(own),
        "out_norm": out_norm,
        "out_act": "relu" if last.endswith(str(1 + (out_norm is not None))) else None,
    }


def _stage(own: Shapes, index: int, top: int) -> dict[str, Any]:
    """One stage: its width, number and kind of blocks, norm, channels of the upsampling block."""
    here = f"stages.{index}.op_list"
    depth = count(own, rf"stages\.{index}\.op_list\.(\d+)\.")
    last = f"{here}.{depth - 1}"
    if f"{last}.context_module.main.qkv.conv.weight" in own:
        width = own[f"{last}.context_module.main.proj.conv.weight"][0]
        scaled = has(own, re.escape(last) + r"\.context_module\.main\.aggreg\.0\.")
        norm = _norm(own, f"{last}.context_module.main.proj.norm")
        block = "EViTS5_GLU" if scaled else "EViT_GLU"
    else:
        width = shape_of(own, f"{last}.main.conv1.conv.weight", "decoder")[0] if depth else top
        norm = _norm(own, f"{last}.main.conv2.norm")
        block = "ResBlock"
    # EViT blocks of the official code drop this norm, so its keys are absent.
    norm = "trms2d" if norm is None and block != "ResBlock" else norm
    found = [own.get(f"{here}.0.{main}conv.conv.weight") for main in ("main.", "")]
    up = next((shape[0] for shape in found if shape is not None), None)
    blocks = depth - (up is not None)
    return {"width": width, "depth": blocks, "block": block, "norm": norm, "up": up}


def _norm(own: Shapes, key: str) -> str | None:
    if f"{key}.running_mean" in own:
        return "bn2d"
    if f"{key}.weight" not in own:
        return None
    return "trms2d" if len(own[f"{key}.weight"]) == 4 else "pixel_trms2d"


def _upsampler(stages: list[dict[str, Any]]) -> str:
    """A pixel shuffle needs four times the stage's channels, interpolation as many."""
    pairs = [(stage["up"], stage["width"]) for stage in stages if stage.get("up")]
    return "InterpolateConv" if pairs and pairs[0][0] == pairs[0][1] else "ConvPixelShuffle"


def _shortcut(own: Shapes) -> str | None:
    up = r"stages\.\d+\.op_list\.0\."
    if has(own, up + r"shortcut\.conv\.conv\.weight"):
        return "InterpolateConv"
    return "duplicating" if has(own, up + r"main\.conv\.conv\.weight") else None
