"""Speed and memory of training steps, loaders, sampling and metrics: a benchmark, never a test.

    python -m dinosae_jax.main --config=configs/bench.py:tiny

No argument: the paper's sizes, for accelerators. Variants: large (a width for two CPU cores), tiny.
`--config.chain="('sae_stage1',)"` picks steps, `"()"` none of them;
`--config.batch_per_device.sae_stage1=8` sets a batch. Also measured: what a run adds to its steps,
the loader, reading of the latent cache (GB/s of one core), encoding and sampling with the networks
of `flow.stage` ('' for none), `encoders.networks`, and the metrics at the papers' size. Batches
are synthetic and parameters random; LPIPS counts except in `tiny`.
"""

from __future__ import annotations

import ml_collections

from configs import rfm_ddt, rfm_dit, sae_stage1, sae_stage2, sae_stage3, sae_stage4
from dinosae_jax import config as config_lib

ROWS = {
    "sae_stage1": sae_stage1,
    "sae_stage2": sae_stage2,
    "sae_stage3": sae_stage3,
    "sae_stage4": sae_stage4,
    "rfm_dit": rfm_dit,
    "rfm_ddt": rfm_ddt,
}
FLOWS = ("rfm_dit", "rfm_ddt")
ENCODER = {
    "data.image_size": 128,
    "model.stem.embed_dim": 384,
    "model.vit.embed_dim": 384,
    "model.vit.depth": 12,
    "model.vit.num_heads": 6,
    "model.vit.ffn_hidden": 1536,
    "model.decoder.latent_channels": 384,
    "model.decoder.width_list": (32, 64, 128, 128, 256),
    "model.decoder.depth_list": (1, 1, 1, 1, 1),
}
LARGE = {
    "sae": {**ENCODER, "model.dino.patch_size": 16, "model.dino.depth": 6}
    | {"model.dino.key_depths": (1, 3, 5)},
    "rfm_dit": {**ENCODER, "model.dit.input_size": 8, "model.dit.in_channels": 384}
    | {f"model.dit.{field}": value for field, value in rfm_dit.SIZES["s"].items()},
    "rfm_ddt": {**ENCODER, "model.dit.input_size": 8, "model.dit.in_channels": 384}
    | {"model.dit.hidden_size": (384, 512), "model.dit.depth": (12, 2)}
    | {"model.dit.num_heads": (6, 8)},
}
CPU = {"warmup": 1, "repeats": 3, "steps": 2}
VARIANTS = {
    "large": {
        **CPU,
        "overhead.repeats": 0,
        **{f"batch_per_device.{row}": 4 for row in ROWS},
        "flow.batch_per_device": 4,
        "encoders.batch_per_device": 4,
        **{
            f"stages.{row}.{field}": value
            for row in ROWS
            for field, value in LARGE[row if row in FLOWS else "sae"].items()
        },
    },
    "tiny": {
        **CPU,
        **{f"batch_per_device.{row}": 16 for row in ROWS},
        "overhead.batch_per_device": 96,
        "overhead.repeats": 3,
        "overhead.stage.data.source": "photos/112",
        "loader.batches": 8,
        "loader.jpegs": 16,
        "metrics.reference": 500,
        "metrics.samples": 1000,
        "metrics.features": 128,
        "latents.images": 64,
        "encoders.networks": ("dinov2_vits14",),
        "encoders.image_size": 32,
        "encoders.batch_per_device": 1,
        "flow.batch_per_device": 8,
        "flow.sampling_steps": 4,
    },
}


def get_config(argument=None):
    """Every step at the paper's size, 32 images per device (flow: 128)."""
    tiny = "tiny" in (argument or "").split(",")
    stages = {name: module.get_config("tiny" if tiny else None) for name, module in ROWS.items()}
    config = ml_collections.ConfigDict(
        dict(
            job="bench",
            name="bench",
            chain=tuple(ROWS),
            stages=stages,
            batch_per_device={name: 128 if name in FLOWS else 32 for name in ROWS},
            warmup=3,
            repeats=5,  # the median of so many
            steps=10,  # groups of steps is reported
            overhead=dict(  # what loader, lines, EMA and checkpoints add to a step
                stage=stages["sae_stage1"].copy_and_resolve_references(),
                batch_per_device=32,
                repeats=5,  # 0: not measured
                steps=10,  # between two lines of metrics
                jpegs=256,  # 500x375, where the stage names no source
            ),
            loader=dict(
                data=sae_stage1.get_config("tiny").data,
                batch_size=64,
                batches=32,
                jpegs=64,
            ),
            metrics=dict(reference=10_000, samples=50_000, features=2048),
            latents=dict(images=512, tokens=256, width=1024, batch_size=64, batches=32),
            encoders=dict(  # with random weights, as teachers
                networks=("dinov3_vitb16", "dinov2_vitb14_reg", "siglip2_vitb16", "mae_vitb16"),
                image_size=256,
                batch_per_device=64,
            ),
            flow=dict(stage="rfm_dit", batch_per_device=64, sampling_steps=50),
            compile_cache="",
        )
    )
    overhead = config.overhead.stage
    overhead.random_frozen_ok, overhead.data.source = ("vit", "lpips"), ""
    overhead.checkpoint.every = 2000  # the tiny stage's 10 are for short runs
    return config_lib.apply_variants(config, argument, VARIANTS)
