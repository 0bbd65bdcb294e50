"""The official DINO-SAE state dict, and its stem and decoder alone.

Keys: `dino_model.*` is facebook's ViT with `patch_embed` replaced by the stem, `decoder.*` the
decoder; `TEACHER_ONLY.patch_embed.proj.*` is the ViT's own patch convolution where a file has it.
The decoder's configuration is read off the keys; activations leave no trace, so they are DC-AE's
habit: relu with batch norm, else silu, relu last.
"""

from __future__ import annotations

import re
from typing import Any

from weights_conversion.mapping import Layout, Shape
from weights_conversion.tables import dinov3
from weights_conversion.tables.keys import UnknownLayoutError, count, has, measure

Shapes = dict[str, Shape]
COUNTERS = r".*\.num_batches_tracked"


def layout(shapes: Shapes) -> Layout:
    """The whole autoencoder: roles stem, vit and decoder."""
    stem = stem_layout(shapes, "dino_model.patch_embed.")
    vit = dinov3.facebook(shapes, "dino_model.", "TEACHER_ONLY.patch_embed")
    decoder = decoder_layout(shapes, "decoder.")
    stem.config["stem"]["embed_dim"] = vit.config["vit"]["embed_dim"]
    return Layout(
        "official",
        {**stem.config, **vit.config, **decoder.config},
        {**vit.rows, **stem.rows, **decoder.rows},
        buffers={**vit.buffers, **decoder.buffers},
        optional=("vit/patch_embed",),
    )


def stem_layout(shapes: Shapes, prefix: str = "") -> Layout:
    """The convolutional stem: `cnn.N.conv.weight`, `cnn.N.norm.weight`."""
    here = re.escape(prefix) + r"cnn\."
    # The last layer alone has no norm.
    layers = max(count(shapes, here + r"(\d+)\."), 1 + count(shapes, here + r"(\d+)\.norm"))
    if not has(shapes, f"^{here}"):
        raise UnknownLayoutError(
            f"a DINO-SAE state dict has a stem ({prefix}cnn.*); got none among {len(shapes)} keys; "
            "check --kind and --container"
        )
    widths = [_stem_width(shapes, here, i) for i in range(layers)]
    config = {"stem": {"embed_dim": widths[-1], "widths": widths[:-1]}}
    return Layout("official", config, {"stem": prefix.rstrip(".")})


def _stem_width(shapes: Shapes, here: str, layer: int) -> int:
    places = {
        here + rf"{layer}\.conv\.weight": "n---",
        here + rf"{layer}\.norm\.weight": "-n--",
        here + rf"{layer + 1}\.conv\.weight": "-n--",
    }
    return measure(shapes, "stem", places, 1024)


def decoder_layout(shapes: Shapes, prefix: str = "") -> Layout:
    """The decoder, its stages in DINO-SAE's order (stages.0 is the lowest resolution)."""
    own = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
    config = {"decoder": infer_decoder(own)}
    buffers = {re.escape(prefix) + COUNTERS: ()}
    return Layout("official", config, {"decoder": prefix.rstrip(".")}, buffers=buffers)


def infer_decoder(own: Shapes) -> dict[str, Any]:
    """Decoder configuration of a state dict in the official order, keys without a prefix.

    Args:
      own: Key -> shape.

    Returns:
      Keyword arguments of `Decoder`.
    """
    first = r"project_in\.(main\.)?conv\."
    top = measure(own, "decoder", {first + "weight": "n---", first + "bias": "n"})
    # Norm and activation, if any, stand before the output layer.
    last = (count(own, r"project_out\.op_list\.(\d+)\.conv\.") or 3) - 1
    output = rf"project_out\.op_list\.{last}\.(conv\.)+"
    outputs = measure(own, "decoder", {output + "weight": "n---", output + "bias": "n"}, 3)
    stages = [_stage(own, k, top) for k in range(count(own, r"stages\.(\d+)\."))]
    upsampler = _upsampler(stages)
    last_up = has(own, rf"^project_out\.op_list\.{last}\.conv\.conv\.")
    if last_up:  # then the stage of the highest resolution has no keys of its own
        width = measure(own, "decoder", {output + "weight": "-n--"}, stages[-1]["width"])
        stages.append({"width": width, "depth": 0, "block": "ResBlock", "norm": "trms2d"})
    stages.reverse()
    # A norm that is missing in one stage only was lost: no published decoder goes without.
    present = [stage["norm"] for stage in stages if stage["norm"]]
    usual = max(present, key=present.count, default=None)
    norms = [stage["norm"] or usual for stage in stages]
    out_norm = _norm(own, r"project_out\.op_list\.0\.") or (usual if last == 2 else None)
    return {
        "latent_channels": measure(own, "decoder", {first + "weight": "-n--"}, top),
        "in_channels": outputs // 4 if last_up and upsampler == "ConvPixelShuffle" else outputs,
        "in_shortcut": "duplicating" if has(own, r"^project_in\.main\.") else None,
        "width_list": [stage["width"] for stage in stages],
        "depth_list": [stage["depth"] for stage in stages],
        "block_type": [stage["block"] for stage in stages],
        "norm": norms,
        "act": ["relu" if norm == "bn2d" else "silu" for norm in norms],
        "upsample_block_type": upsampler,
        "upsample_shortcut": _shortcut(own),
        "out_norm": out_norm,
        "out_act": "relu" if last == 1 + (out_norm is not None) else None,
    }


def _stage(own: Shapes, index: int, top: int) -> dict[str, Any]:
    """One stage: its width, number and kind of blocks, norm, channels of the upsampling block."""
    stage = rf"stages\.{index}\.op_list\."
    block = stage + r"\d+\."
    evit = has(own, f"^{block}context_module")
    scaled = has(own, f"^{block}" + r"context_module\.main\.aggreg\.")
    places = {block + name: axes for name, axes in (EVIT_WIDTH if evit else RES_WIDTH).items()}
    norm = _norm(own, block + (EVIT_NORM if evit else RES_NORM))
    up = stage + r"0\.(main\.)?conv\.conv\."
    up_width = measure(own, "decoder", {up + "weight": "n---", up + "bias": "n"}, 0)
    return {
        "width": measure(own, "decoder", places, top),
        "depth": count(own, stage + r"(\d+)\.") - has(own, f"^{up}"),
        "block": ("EViTS5_GLU" if scaled else "EViT_GLU") if evit else "ResBlock",
        # EViT blocks of the official code drop this norm, so its keys are absent.
        "norm": norm or ("trms2d" if evit else None),
        "up": up_width,
    }


RES_WIDTH = {
    r"main\.conv1\.conv\.weight": "n---",
    r"main\.conv2\.conv\.weight": "-n--",
    r"main\.conv1\.conv\.bias": "n",
}
RES_NORM = r"main\.conv2\.norm\."
EVIT_WIDTH = {
    r"context_module\.main\.proj\.conv\.weight": "n---",
    r"local_module\.main\.inverted_conv\.conv\.weight": "-n--",
    r"local_module\.main\.point_conv\.conv\.weight": "n---",
}
EVIT_NORM = r"(?:context_module\.main\.proj|local_module\.main\.point_conv)\.norm\."


def _norm(own: Shapes, place: str) -> str | None:
    """Batch norm keeps statistics; the norm per pixel has a bias; the other one keeps four axes."""
    found = [(re.fullmatch(place + r"(\w+)", key), shape) for key, shape in own.items()]
    leaves = [(match[1], len(shape)) for match, shape in found if match]
    if any(leaf.startswith(("running_", "num_")) for leaf, _ in leaves):
        return "bn2d"
    if not leaves:
        return None
    return (
        "trms2d"
        if {leaf for leaf, _ in leaves} == {"weight"} and ("weight", 4) in leaves
        else ("pixel_trms2d")
    )


def _upsampler(stages: list[dict[str, Any]]) -> str:
    """A pixel shuffle needs four times the stage's channels, interpolation as many."""
    equal = [stage["up"] == stage["width"] for stage in stages if stage["up"]]
    return "InterpolateConv" if 2 * sum(equal) > len(equal) else "ConvPixelShuffle"


def _shortcut(own: Shapes) -> str | None:
    up = r"^stages\.\d+\.op_list\.0\."
    if has(own, up + r"shortcut\.conv\.conv\."):
        return "InterpolateConv"
    return "duplicating" if has(own, up + r"main\.conv\.conv\.") else None
