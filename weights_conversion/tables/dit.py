"""LightningDiT (the original's and RAE's) and RAE's DiT^DH.

Our names are the reference's; the RoPE tables, which we compute, are kept as stored. Heads show in
the RoPE tables or the query norm; where there is neither, the published sizes' are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dinosae_jax import sizes
from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables.keys import UnknownLayoutError, count, has, measure

Shapes = dict[str, Shape]
ROPE_TABLES = r"(enc_|dec_)?feat_rope\.freqs_(cos|sin)"
OUTPUTS = {r"final_layer\.linear\.weight": "n-", r"final_layer\.linear\.bias": "n"}
TIME_WIDTH = {r"t_embedder\.mlp\.[02]\.bias": "n", r"t_embedder\.mlp\.[02]\.weight": "n-"}


def original_layout(shapes: Shapes) -> Layout:
    """LightningDiT with a sinusoidal time embedding."""
    return _lightningdit(shapes, "sinusoidal")


def rae_layout(shapes: Shapes) -> Layout:
    """RAE's LightningDiT, whose time embedding has Fourier frequencies `t_embedder.W`."""
    return _lightningdit(shapes, "fourier")


def _lightningdit(shapes: Shapes, time_embedding: str) -> Layout:
    kind = "LightningDiT"
    kernel = r"x_embedder\.proj\.weight"
    embedder = {kernel: "n---", r"x_embedder\.proj\.bias": "n", "pos_embed": "--n"}
    width = measure(shapes, kind, embedder | TIME_WIDTH)
    patch = measure(shapes, kind, {kernel: "---n"}, 1)
    outputs = measure(shapes, kind, OUTPUTS, patch**2)
    channels = measure(shapes, kind, {kernel: "-n--"}, max(outputs // patch**2, 1))
    modulation = {
        r"blocks\.\d+\.adaLN_modulation\.1\.weight": "n-",
        r"blocks\.\d+\.adaLN_modulation\.1\.bias": "n",
    }
    tokens = measure(shapes, kind, {"pos_embed": "-n-", ROPE_TABLES: "n-"}, 256)
    config = {
        "model": "LightningDiT",
        "time_embedding": time_embedding,
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "num_heads": _heads(shapes, width, r"feat_rope\.", r"blocks\.\d+\."),
        "use_rope": has(shapes, r"^feat_rope\."),
        "wo_shift": measure(shapes, kind, modulation, 6 * width) == 4 * width,
        "learn_sigma": outputs == 2 * channels * patch**2,
        **_common(shapes, width, r"blocks\.\d+\."),
    }
    rows: dict[str, Row] = {"dit": "", "dit/blocks": "blocks.{i}"}
    buffers = {ROPE_TABLES: (tokens, width // config["num_heads"])}
    return Layout(kind, {"dit": config}, rows, buffers=buffers)


def ditdh_layout(shapes: Shapes) -> Layout:
    """DiT^DH: one list of blocks in the file, two stacks here."""
    kind = "DiT^DH"
    kernel = r"s_embedder\.proj\.weight"
    embedder = {kernel: "n---", r"s_embedder\.proj\.bias": "n", "pos_embed": "--n"}
    encoder = measure(shapes, kind, embedder)
    output = {r"final_layer\.linear\.weight": "-n", r"x_embedder\.proj\.bias": "n"}
    head = measure(shapes, kind, {r"x_embedder\.proj\.weight": "n---"} | output)
    blocks = count(shapes, r"blocks\.(\d+)\.")
    widths = [_block_width(shapes, i) for i in range(blocks)]
    # Equal widths do not show where the head begins; every published one has two blocks.
    first = blocks - 2 if encoder == head else widths.index(head) if head in widths else blocks
    stacks = [_any_block(range(first)), _any_block(range(first, blocks))]
    config = {
        "model": "DiTDH",
        "input_size": math.isqrt(
            measure(shapes, kind, {"pos_embed": "-n-", ROPE_TABLES: "n-"}, 256)
        ),
        "in_channels": measure(shapes, kind, {r"[xs]_embedder\.proj\.weight": "-n--"} | OUTPUTS),
        "hidden_size": [encoder, head],
        "depth": [first, blocks - first],
        "num_heads": [
            _heads(shapes, encoder, r"enc_feat_rope\.", stacks[0]),
            _heads(shapes, head, r"dec_feat_rope\.", stacks[1]),
        ],
        "use_rope": has(shapes, r"^(enc|dec)_feat_rope\."),
        "use_pos_embed": "pos_embed" in shapes,
        **_common(shapes, encoder, stacks[0]),
    }
    return ditdh_table({"dit": config})


def _any_block(indices: Iterable[int]) -> str:
    return rf"blocks\.({'|'.join(map(str, indices))})\."


def _block_width(shapes: Shapes, index: int) -> int:
    block = rf"blocks\.{index}\."
    places = {
        block + r"attn\.proj\.weight": "n-",
        block + r"attn\.proj\.bias": "n",
        block + r"attn\.qkv\.weight": "-n",
    }
    return measure(shapes, "DiT^DH", places, 1)


def ditdh_table(config: dict[str, dict[str, Any]]) -> Layout:
    """The table of DiT^DH for a configuration, on which the split of the blocks depends."""
    own = config["dit"]
    first = own["depth"][0]
    rows: dict[str, Row] = {
        "dit": "",
        "dit/blocks_encoder": "blocks.{i}",
        "dit/blocks_head": f"blocks.{{i+{first}}}",
    }
    buffers: dict[str, Shape | None] = {
        rf"{name}_feat_rope\.freqs_(cos|sin)": (own["input_size"] ** 2, width // heads)
        for name, width, heads in zip(
            ("enc", "dec"), own["hidden_size"], own["num_heads"], strict=True
        )
    }
    return Layout("DiT^DH", config, rows, buffers=buffers)


def _common(shapes: Shapes, width: int, block: str) -> dict[str, Any]:
    """What both models read off the label table and the blocks that the pattern fits."""
    swiglu = has(shapes, r"^blocks\.\d+\.mlp\.(w12|w3)\.")
    table = {r"y_embedder\.embedding_table\.weight": "n-"}
    rows = measure(shapes, "diffusion transformer", table, 1001)
    # The table's last row is the null label, but for a model trained without dropping labels.
    dropped = rows != 1000
    return {
        "num_classes": rows - dropped,
        "class_dropout_prob": 0.1 if dropped else 0.0,
        "use_qknorm": has(shapes, r"^blocks\.\d+\.attn\.[qk]_norm\."),
        "use_swiglu": swiglu,
        "use_rmsnorm": has(shapes, r"^(blocks\.\d+\.norm[12]|final_layer\.norm_final)\.weight$"),
        "mlp_ratio": _mlp_ratio(shapes, width, swiglu, block),
    }


def _mlp_ratio(shapes: Shapes, width: int, swiglu: bool, block: str) -> float:
    kind = "diffusion transformer"
    plain = {
        block + r"mlp\.fc1\.weight": "n-",
        block + r"mlp\.fc1\.bias": "n",
        block + r"mlp\.(fc2|w3)\.weight": "-n",
    }
    fused = {block + r"mlp\.w12\.weight": "n-", block + r"mlp\.w12\.bias": "n"}
    hidden = measure(shapes, kind, plain, int(8 / 3 * width) if swiglu else 4 * width)
    if swiglu:
        hidden = measure(shapes, kind, fused, 2 * hidden) // 2
    if not swiglu:
        return hidden / width
    candidates = [4.0, *(n / width for n in range(int(1.5 * hidden) - 1, int(1.5 * hidden) + 4))]
    fitting = [r for r in candidates if int(2 / 3 * int(r * width)) == hidden]
    if not fitting:
        raise UnknownLayoutError(
            f"a SwiGLU has int(2/3 * mlp_ratio * width) units; got {hidden} at width {width}; "
            "check --kind and --container"
        )
    return fitting[0]


def _heads(shapes: Shapes, width: int, rope: str, block: str) -> int:
    """Heads by their width, or those of the published model of this width."""
    places = {rope + "freqs_(cos|sin)": "-n", block + r"attn\.[qk]_norm\.weight": "n"}
    head_width = measure(shapes, "diffusion transformer", places, width + 1)
    if width % head_width == 0:
        return width // head_width
    heads = {s["hidden_size"]: s["num_heads"] for s in sizes.LIGHTNING_DIT.values()}
    for size in sizes.DIT_DH.values():
        heads |= dict(zip(size["hidden_size"], size["num_heads"], strict=True))
    return heads.get(width, max(width // 64, 1))
