"""The networks of the losses and metrics: DINO discriminator, LPIPS, Inception, EfficientNet."""

from __future__ import annotations

from typing import Any

from weights_conversion.mapping import Layout, Row, Shape
from weights_conversion.tables.keys import UnknownLayoutError, count, has, measure

Shapes = dict[str, Shape]

# lpips' slices of VGG16, by torchvision's index in `features`.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SLICE_STARTS = (0, 4, 9, 16, 23)

STATISTICS = {"mean": "running_mean", "var": "running_var"}  # batch norm's
BATCH_COUNTERS = {r".*\.num_batches_tracked": ()}


def discriminator_layout(shapes: Shapes) -> Layout:
    """RAE's heads (`heads.*`), DINO v1's backbone, or the two in one state dict."""
    config: dict[str, dict[str, Any]] = {}
    rows: dict[str, Row] = {}
    if has(shapes, r"^(cls_token|pos_embed|patch_embed\.|blocks\.)"):
        config["dino"] = _trunk(shapes)
        rows |= {"dino": "", "dino/blocks": "blocks.{i}"}
    if has(shapes, r"^heads\."):
        kernel, kind = r"heads\.\d+\.1\.fn\.0\.weight_orig", "discriminator"
        channels = {kernel: "n--", r"heads\.\d+\.1\.fn\.0\.bias": "n"}
        config["disc_heads"] = {
            "num_heads": count(shapes, r"heads\.(\d+)\."),
            "channels": measure(shapes, kind, channels),
            "kernel_size": measure(shapes, kind, {kernel: "--n"}),
        }
        rows |= _head_rows(config["disc_heads"]["num_heads"])
    if not config:
        raise UnknownLayoutError(
            "a discriminator has heads (heads.*) or a DINO backbone (cls_token); got neither among "
            f"{len(shapes)} keys; check --kind and --container"
        )
    # RAE reads the trunk's blocks and never its final norm.
    return Layout("rae", config, rows, buffers={r"norm\.(weight|bias)": None})


def _trunk(shapes: Shapes) -> dict[str, Any]:
    kind = "DINO"
    width = measure(shapes, kind, {"cls_token": "--n", "pos_embed": "--n"})
    depth = count(shapes, r"blocks\.(\d+)\.")
    hidden = {
        r"blocks\.\d+\.mlp\.fc1\.weight": "n-",
        r"blocks\.\d+\.mlp\.fc1\.bias": "n",
        r"blocks\.\d+\.mlp\.fc2\.weight": "-n",
    }
    return {
        "patch_size": measure(shapes, kind, {r"patch_embed\.proj\.weight": "---n"}, 16),
        "embed_dim": width,
        "depth": depth,
        "num_heads": max(width // 64, 1),
        "key_depths": [(k + 1) * depth // 4 - 1 for k in range(4)] if depth >= 4 else [0],
        "mlp_ratio": measure(shapes, kind, hidden, 4 * width) / width,
    }


def _head_rows(heads: int) -> dict[str, Row]:
    """Spectral norm's leaves; the rest follows the naming rule."""
    rows: dict[str, Row] = {"disc_heads": ""}
    names = {"kernel": "weight_orig", "u": "weight_u", "v": "weight_v"}
    for i in range(heads):
        convs = {
            f"heads_{i}_0_0": f"heads.{i}.0.0",
            f"heads_{i}_1/fn_0": f"heads.{i}.1.fn.0",
            f"heads_{i}_2": f"heads.{i}.2",
        }
        for ours, theirs in convs.items():
            rows |= {f"disc_heads/{ours}/{k}": f"{theirs}.{v}" for k, v in names.items()}
    return rows


def lpips_layout(shapes: Shapes) -> Layout:
    """VGG16 of torchvision, the LPIPS heads, both, or an `lpips.LPIPS` module."""
    rows: dict[str, Row] = {"lpips": ""}
    for number, indices in enumerate(SLICES):
        local = f"net.slice5.{28 - SLICE_STARTS[4]}.weight" in shapes
        start = SLICE_STARTS[number] if local else 0
        for index in indices if has(shapes, r"^net\.slice") else ():
            rows[f"lpips/features_{index}"] = f"net.slice{number + 1}.{index - start}"
    trunk = [f"lpips/features_{i}" for indices in SLICES for i in indices]
    heads = [f"lpips/lin{i}" for i in range(len(SLICES))]
    has_trunk, has_heads = has(shapes, r"^(features|net)\."), has(shapes, r"^lin\d\.")
    if not has_trunk and not has_heads:
        raise UnknownLayoutError(
            f"LPIPS has VGG16 (features.*) or heads (lin*); got neither among {len(shapes)} keys; "
            "check --kind and --container"
        )
    return Layout(
        "lpips_module" if has(shapes, r"^net\.slice") else "torchvision",
        {"lpips": {}},
        rows,
        # Layers that LPIPS does not use; constants; the second names that a list of modules gives.
        buffers=dict.fromkeys((r"classifier\..*", r"scaling_layer\..*", r"lins\..*")),
        optional=(*(() if has_trunk else trunk), *(() if has_heads else heads)),
    )


def inception_layout(shapes: Shapes) -> Layout:
    """The FID Inception of pytorch-fid and torch-fidelity."""
    if not has(shapes, r"^Mixed_\d[a-z]\."):
        raise UnknownLayoutError(
            f"a FID Inception state dict has Mixed_*; got none among {len(shapes)} keys; check "
            "--kind and --container"
        )
    rows = {"inception": ""}
    return Layout("torch", {"inception": {}}, rows, STATISTICS, False, BATCH_COUNTERS)


def efficientnet_layout(shapes: Shapes) -> Layout:
    """EfficientNet-Lite0 in the keys of EfficientNet-PyTorch and its ports."""
    if not has(shapes, r"^_blocks\.\d+\._depthwise_conv\."):
        raise UnknownLayoutError(
            "an EfficientNet state dict has _blocks.N._depthwise_conv; got none among "
            f"{len(shapes)} keys; check --kind and --container"
        )
    rows = {"efficientnet": ""}
    return Layout("torch", {"efficientnet": {}}, rows, STATISTICS, True, BATCH_COUNTERS)
