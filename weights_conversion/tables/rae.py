"""RAE's decoder and whole autoencoder: diffusers' AutoencoderRAE, and RAE's own files.

diffusers has one file: `encoder.*`, `decoder.*`, `_latents_mean`, `_latents_std`. RAE has three:
the encoder as Hugging Face publishes it, the decoder, and the statistics (`mean`, `var`). diffusers
does not store the decoder's table of positions, whose rule is another than RAE's on all grids but
16 x 16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dinosae_jax.encoders import FAMILIES
from dinosae_jax.models import positions
from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables import encoders
from weights_conversion.tables.keys import UnknownLayoutError, count, has, measure

Shapes = dict[str, Shape]
KIND = "RAE"
DEFAULT_GRID = 16
DIFFUSERS = encoders.MAE._replace(
    qkv=tuple(f"attention.to_{x}" for x in "qkv"), out="attention.to_out.0"
)
# Names of the statistics: theirs of the mean, theirs of the second moment, ours of the latter.
STATISTICS = {
    "diffusers": ("_latents_mean", "_latents_std", "deviation"),
    "rae": ("mean", "var", "variance"),
}
RAE_FAMILIES = {kind: FAMILIES[f"rae_{kind}"] for kind in encoders.KINDS}  # type: ignore[index]
DECODER = r"decoder_|trainable_cls_token"  # the beginnings of keys in RAE's decoder file
CONSTANTS = r"encoder_(mean|std)"  # of the encoder's preprocessing


def decoder_layout(shapes: Shapes) -> Layout:
    """The decoder and, where the file has them, the statistics; an encoder is kept as stored."""
    is_diffusers = has(shapes, r"^decoder\.decoder_embed\.")
    name, prefix = ("diffusers", "decoder.") if is_diffusers else ("rae", "")
    names = DIFFUSERS if is_diffusers else encoders.MAE
    mean, second, ours = STATISTICS[name]
    config = _decoder_config(shapes, prefix, names, mean, second)
    if config["statistics_side"]:
        config["statistics"] = ours
    else:
        del config["statistics_side"]
    rows: dict[str, Row] = {
        "decoder": prefix.rstrip("."),
        "decoder/cls_token": f"{prefix}trainable_cls_token",
        "decoder/pos_embed": f"{prefix}decoder_pos_embed",
        "decoder/mean": mean,
        f"decoder/{ours}": second,
        **encoders.block_rows("decoder/blocks", f"{prefix}decoder_layers.{{i}}", names),
    }
    buffers: dict[str, Shape | None] = {CONSTANTS: (1, 3, 1, 1), r"encoder\..*": None}
    buffers |= {re.escape(prefix) + r"mask_token": None}
    derive = _diffusers_table if is_diffusers else (lambda path, shape: None)
    if mean in shapes and shapes[mean][:1] != (config["latent_channels"],):
        raise UnknownLayoutError(
            "statistics of latents have the decoder's channels, "
            f"{config['latent_channels']}; got {shapes[mean]} in {mean}; give those of this decoder"
        )
    return Layout(name, {"decoder": config}, rows, buffers=buffers, derive=derive)


def autoencoder_layout(shapes: Shapes) -> Layout:
    """Roles stem (the encoder's own patch convolution), vit and decoder."""
    decoder = decoder_layout(shapes)
    prefix = "encoder." if decoder.name == "diffusers" else ""
    own = {k: s for k, s in shapes.items() if k.startswith(prefix) and not re.match(DECODER, k)}
    kind, read = _encoder(own, prefix)
    vit = read(own, prefix)
    config = {**vit.config["vit"], **RAE_FAMILIES[kind].vit}
    # What the file shows of the tokens and the table is the file's.
    config |= {name: value for name, value in vit.config["vit"].items() if name in _SHOWN}
    if config["embed_dim"] != decoder.config["decoder"]["latent_channels"]:
        raise UnknownLayoutError(
            f"an RAE's decoder reads the tokens of its encoder, {config['embed_dim']} wide; got a "
            f"decoder of {decoder.config['decoder']['latent_channels']} channels; give the files "
            "of one autoencoder"
        )
    stem = {"kind": "patch", "embed_dim": config["embed_dim"], "patch_size": config["patch_size"]}
    rows = {**vit.rows, "stem/proj": vit.rows["vit/patch_embed/proj"], **decoder.rows}
    norm = str(vit.rows["vit/norm"])
    buffers = {CONSTANTS: (1, 3, 1, 1), **vit.buffers}
    buffers |= {re.escape(norm) + r"\.(weight|bias)": (config["embed_dim"],)}

    def derive(path: str, shape: Shape) -> np.ndarray | None:
        return (decoder if path.startswith("decoder/") else vit).derive(path, shape)

    return Layout(
        decoder.name,
        {"stem": stem, "vit": config, **decoder.config},
        rows,
        buffers=buffers,
        derive=derive,
        model={
            "encoder": f"rae_{kind}",
            "pixel_range": "symmetric" if kind == "siglip2" else "imagenet",
        },
    )


_SHOWN = ("num_storage_tokens", "patch_size", "table_side", "table_resize", "ffn_layer")


def _encoder(own: Shapes, prefix: str) -> tuple[str, Callable[..., Layout]]:
    """The kind of the encoder, and what reads its layout."""
    before = re.escape(prefix)
    if has(own, rf"^{before}embeddings\.patch_embedding\."):
        return "siglip2", encoders.siglip2
    if has(own, rf"^{before}.*\.layernorm_before\."):
        return "mae", encoders.mae
    if has(own, rf"^{before}embeddings\.patch_embeddings\."):
        return "dinov2", encoders.dinov2
    raise UnknownLayoutError(
        "an RAE has an encoder that Hugging Face's names show (DINOv2, SigLIP2 or MAE); got "
        f"{len(own)} keys without one; give its file too, or convert with --kind=rae_decoder"
    )


def _decoder_config(
    shapes: Shapes, prefix: str, names: encoders.Names, mean: str, second: str
) -> dict[str, Any]:
    before = re.escape(prefix)
    block = before + r"decoder_layers\."
    embed = before + r"decoder_embed\."
    width = measure(shapes, KIND, {embed + "weight": "n-", embed + "bias": "n"})
    pred = before + r"decoder_pred\."
    outputs = measure(shapes, KIND, {pred + "weight": "n-", pred + "bias": "n"}, 3 * 16**2)
    first = block + r"\d+\." + re.escape(names.fc[0])
    hidden = {first + r"\.weight": "n-", first + r"\.bias": "n"}
    table = shapes.get(f"{prefix}decoder_pos_embed", ())
    moments = {re.escape(name): axes for name in (mean, second) for axes in ("-n-",)}
    side = measure(shapes, KIND, moments, 0) if mean in shapes else 0
    grid = math.isqrt(table[1]) if len(table) == 3 else side if side > 1 else DEFAULT_GRID
    return {
        "kind": "vit",
        "latent_channels": measure(shapes, KIND, {embed + "weight": "-n"}, width),
        "grid": grid,
        "hidden_size": width,
        "depth": count(shapes, block + r"(\d+)\."),
        "num_heads": encoders.HEADS.get(width, max(width // 64, 1)),
        "ffn_hidden": measure(shapes, KIND, hidden, 4 * width),
        "patch_size": math.isqrt(outputs // 3),
        "statistics_side": side,
    }


def _diffusers_table(path: str, shape: Shape) -> np.ndarray | None:
    """The table of positions that diffusers computes: coordinates index * 16 / grid."""
    if path != "decoder/pos_embed":
        return None
    grid = math.isqrt(shape[1])
    table = positions.sincos_table(grid, shape[2], DEFAULT_GRID / grid)
    return np.concatenate([np.zeros((1, shape[2]), np.float32), table])[None]
