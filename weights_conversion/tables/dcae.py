"""Decoders of DC-AE: efficientvit's keys and diffusers' AutoencoderDC.

Both count stages from the highest resolution; we and DINO-SAE count in the order of execution. An
encoder in the same file is kept as stored. diffusers' `to_q`, `to_k`, `to_v` are thirds of the
fused weight, not queries, keys and values, so they are joined again.
"""

from __future__ import annotations

import re

from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables.dinosae import COUNTERS, infer_decoder
from weights_conversion.tables.keys import count, has

Shapes = dict[str, Shape]
ENCODER = r"encoder\..*"

# The names of a block's layers: in our tree below op_list_N, and in diffusers.
DIFFUSERS_BLOCK = {
    "main/conv/conv": "conv",
    "conv/conv": "conv",
    "main/conv1/conv": "conv1",
    "main/conv2/conv": "conv2",
    "main/conv2/norm": "norm",
    "context_module/main/aggreg_0_0": "attn.to_qkv_multiscale.0.proj_in",
    "context_module/main/aggreg_0_1": "attn.to_qkv_multiscale.0.proj_out",
    "context_module/main/proj/conv": "attn.to_out",
    "context_module/main/proj/norm": "attn.norm_out",
    "local_module/main/inverted_conv/conv": "conv_out.conv_inverted",
    "local_module/main/depth_conv/conv": "conv_out.conv_depth",
    "local_module/main/point_conv/conv": "conv_out.conv_point",
    "local_module/main/point_conv/norm": "conv_out.norm",
}


def layout(shapes: Shapes) -> Layout:
    """Reads layout and configuration off the keys."""
    prefix = "decoder." if any(key.startswith("decoder.") for key in shapes) else ""
    own = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
    if has(own, r"^(conv_in|up_blocks|conv_out)\."):
        return _diffusers(own, prefix)
    last = _last_stage(own, r"stages\.(\d+)\.")
    config = infer_decoder(_reversed(own, "stages", last))
    rows: dict[str, Row] = {"decoder": prefix.rstrip(".")}
    rows |= {f"decoder/stages_{k}": f"{prefix}stages.{last - k}" for k in range(last + 1)}
    return Layout("efficientvit", {"decoder": config}, rows, buffers=_buffers(prefix))


def _buffers(prefix: str) -> dict[str, Shape | None]:
    return {ENCODER: None, re.escape(prefix) + COUNTERS: ()}


def _last_stage(own: Shapes, pattern: str) -> int:
    return count(own, pattern) - 1


def _reversed(own: Shapes, name: str, last: int) -> Shapes:
    """The keys with their stages counted in the order of execution."""
    pattern = rf"{name}\.(\d+)\."
    return {
        re.sub(pattern, lambda m: f"stages.{last - int(m[1])}.", key): shape
        for key, shape in own.items()
    }


def _diffusers(own: Shapes, prefix: str) -> Layout:
    last = _last_stage(own, r"up_blocks\.(\d+)\.")
    official = _official_names(own, last)
    config = infer_decoder(official)
    # Shortcuts have no keys in diffusers; AutoencoderDC has them where the channels allow it.
    latent, top = config["latent_channels"], config["width_list"][-1]
    config["in_shortcut"] = "duplicating" if top % latent == 0 else None
    rows: dict[str, Row] = {
        "decoder/project_in/main/conv": f"{prefix}conv_in",
        "decoder/project_in/conv": f"{prefix}conv_in",
        "decoder/project_out/op_list_0": f"{prefix}norm_out",
        "decoder/project_out/op_list_2/conv": f"{prefix}conv_out",
        "decoder/project_out/op_list_2/conv/conv": f"{prefix}conv_out.conv",
    }
    for k in range(last + 1):
        stage = f"{prefix}up_blocks.{last - k}"
        for i in range(count(own, rf"up_blocks\.{last - k}\.(\d+)\.")):
            rows |= _diffusers_block(f"decoder/stages_{k}/op_list_{i}", f"{stage}.{i}")
    return Layout("diffusers", {"decoder": config}, rows, buffers=_buffers(prefix))


def _diffusers_block(ours: str, theirs: str) -> dict[str, Row]:
    rows: dict[str, Row] = {f"{ours}/{k}": f"{theirs}.{v}" for k, v in DIFFUSERS_BLOCK.items()}
    thirds = tuple(f"{theirs}.attn.to_{name}.weight" for name in "qkv")
    return rows | {f"{ours}/context_module/main/qkv/conv/kernel": thirds}


def _official_names(own: Shapes, last: int) -> Shapes:
    """The keys of diffusers under the official names that `infer_decoder` knows."""
    names = {
        theirs: ours.replace("/", ".")
        for ours, theirs in DIFFUSERS_BLOCK.items()
        if ours != "conv/conv"
    }
    found: Shapes = {}
    for key, shape in _reversed(own, "up_blocks", last).items():
        match = re.fullmatch(r"(stages\.\d+)\.(\d+)\.(.+)\.(\w+)", key)
        if match is None:
            continue
        stage, index, module, leaf = match.groups()
        module = {"attn.to_q": "context_module.main.qkv.conv"}.get(
            module, names.get(module, module)
        )
        module = module.replace("aggreg_0_", "aggreg.0.")
        # diffusers has matrices where the others have convolutions of one pixel.
        found[f"{stage}.op_list.{index}.{module}.{leaf}"] = shape + (1, 1) * (len(shape) == 2)
    ends = {
        "conv_in": "project_in.main.conv",
        "conv_out": "project_out.op_list.2.conv",
        "conv_out.conv": "project_out.op_list.2.conv.conv",
        "norm_out": "project_out.op_list.0",
    }
    for theirs, official in ends.items():
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in own:
                found[f"{official}.{leaf}"] = own[f"{theirs}.{leaf}"]
    return found
