"""LightningDiT (the original's and RAE's) and RAE's DiT^DH.

Our names are the reference's; the RoPE tables, which we compute, are kept as stored. Heads show in
the RoPE tables or the query norm; where there is neither, the published sizes' are taken.
"""

import math
from typing import Any

from dinosae_jax.models import ddt, dit
from weights_conversion.rules import Layout, Shape
from weights_conversion.tables.keys import UnknownLayoutError, count, shape_of

Shapes = dict[str, Shape]
ROPE_TABLES = r"(enc_|dec_)?feat_rope\.freqs_(cos|sin)"


def original_layout(shapes: Shapes) -> Layout:
    """LightningDiT with a sinusoidal time embedding."""
    return _lightningdit(shapes, "sinusoidal")


def rae_layout(shapes: Shapes) -> Layout:
    """RAE's LightningDiT, whose time embedding has Fourier frequencies `t_embedder.W`."""
    return _lightningdit(shapes, "fourier")


def _lightningdit(shapes: Shapes, time_embedding: str) -> Layout:
    kind = "LightningDiT"
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", kind)
    tokens = shape_of(shapes, "pos_embed", kind)[1]
    outputs = shape_of(shapes, "final_layer.linear.weight", kind)[0]
    modulation = shape_of(shapes, "blocks.0.adaLN_modulation.1.weight", kind)[0]
    config = {
        "model": "LightningDiT",
        "time_embedding": time_embedding,
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "num_heads": _heads(shapes, width, "feat_rope", 0),
        "use_rope": "feat_rope.freqs_cos" in shapes,
        "wo_shift": modulation == 4 * width,
        "learn_sigma": outputs == 2 * channels * patch**2,
        **_common(shapes, width),
    }
    rows = {"dit": "", "dit/blocks": "blocks.{i}"}
    return Layout(kind, {"dit": config}, rows, buffers=(ROPE_TABLES,))


def ditdh_layout(shapes: Shapes) -> Layout:
    """DiT^DH: one list of blocks in the file, two stacks here."""
    kind = "DiT^DH"
    encoder, channels = shape_of(shapes, "s_embedder.proj.weight", kind)[:2]
    head = shape_of(shapes, "x_embedder.proj.weight", kind)[0]
    blocks = count(shapes, r"blocks\.(\d+)\.")
    widths = [shapes.get(f"blocks.{i}.attn.proj.bias", (0,))[0] for i in range(blocks)]
    # Equal widths do not show where the head begins; every published one has two blocks.
    first = blocks - 2 if encoder == head else widths.index(head) if head in widths else blocks
    tokens = shapes.get("pos_embed", shapes.get("enc_feat_rope.freqs_cos", (256, 256)))[-2]
    config = {
        "model": "DiTDH",
        "input_size": math.isqrt(tokens),
        "in_channels": channels,
        "hidden_size": [encoder, head],
        "depth": [first, blocks - first],
        "num_heads": [
            _heads(shapes, encoder, "enc_feat_rope", 0),
            _heads(shapes, head, "dec_feat_rope", first),
        ],
        "use_rope": "enc_feat_rope.freqs_cos" in shapes,
        "use_pos_embed": "pos_embed" in shapes,
        **_common(shapes, encoder),
    }
    return ditdh_table({"dit": config})


def ditdh_table(config: dict[str, dict[str, Any]]) -> Layout:
    """The table of DiT^DH for a configuration, on which the split of the blocks depends."""
    first = config["dit"]["depth"][0]
    rows = {
        "dit": "",
        "dit/blocks_encoder": "blocks.{i}",
        "dit/blocks_head": f"blocks.{{i+{first}}}",
    }
    return Layout("DiT^DH", config, rows, buffers=(ROPE_TABLES,))


def _common(shapes: Shapes, width: int) -> dict[str, Any]:
    """What both models read off the first block and the embedders."""
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    rows = shape_of(shapes, "y_embedder.embedding_table.weight", "diffusion transformer")[0]
    # The table's last row is the null label, but for a model trained without dropping labels.
    dropped = rows != 1000
    return {
        "num_classes": rows - dropped,
        "class_dropout_prob": 0.1 if dropped else 0.0,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in shapes,
        "use_swiglu": swiglu,
        "use_rmsnorm": "blocks.0.norm1.weight" in shapes,
        "mlp_ratio": _mlp_ratio(shapes, width, swiglu),
    }


def _mlp_ratio(shapes: Shapes, width: int, swiglu: bool) -> float:
    if not swiglu:
        return shape_of(shapes, "blocks.0.mlp.fc1.weight", "diffusion transformer")[0] / width
    hidden = shapes["blocks.0.mlp.w12.weight"][0] // 2
    candidates = [4.0, *(n / width for n in range(int(1.5 * hidden) - 1, int(1.5 * hidden) + 4))]
    fitting = [r for r in candidates if int(2 / 3 * int(r * width)) == hidden]
    if not fitting:
        raise UnknownLayoutError(f"no mlp_ratio gives a SwiGLU of {hidden} units at width {width}")
    return fitting[0]


def _heads(shapes: Shapes, width: int, rope: str, block: int) -> int:
    for key in (f"{rope}.freqs_cos", f"blocks.{block}.attn.q_norm.weight"):
        if key in shapes:
            return width // shapes[key][-1]
    sizes = {s["hidden_size"]: s["num_heads"] for s in dit.SIZES.values()}
    for size in ddt.SIZES.values():
        sizes |= dict(zip(size["hidden_size"], size["num_heads"], strict=True))
    return sizes.get(width, max(width // 64, 1))
