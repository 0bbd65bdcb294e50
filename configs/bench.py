"""Speed and memory of training steps, loaders, sampling and metrics: a benchmark, never a test.

    python -m dinosae_jax.main --config=configs/bench.py:tiny

No argument: the paper's sizes, for accelerators. Variants: large (a width for two CPU cores), tiny.
`--config.chain="('sae_stage1',)"` picks steps, `"()"` none of them;
`--config.batch_per_device.sae_stage1=8` sets a batch. Also measured: what a run adds to its steps,
the loader, reading of the latent cache (GB/s of one core), encoding and sampling with the networks
of `flow.stage` ('' for none), and the metrics at the papers' size. Batches are synthetic and
parameters random; LPIPS counts except in `tiny`.

The variant `card` measures one H100 or H200 in at most eight minutes, each row in a process of its
own (docs/cards.md): steps, samplers, encoding, attention, errors of heads and of bias gradients,
bitwise repetition, loader. `card,tiny` rehearses it on a CPU.

    python -m dinosae_jax.main --config=configs/bench.py:card --config.card.ledger=docs/cards.json
"""

from __future__ import annotations

import ml_collections

from configs import rfm_ddt, rfm_dit, sae_stage1, sae_stage2, sae_stage3, sae_stage4
from dinosae_jax import config as config_lib
from dinosae_jax import names

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
# Name -> images, tokens, heads, head width.
ATTENTION = {
    "lightningdit_xl": (128, 256, 16, 72),
    "vit_l": (128, 261, 16, 64),
    "dino_s8": (32, 785, 6, 64),
    "ddt_head": (128, 256, 16, 128),
    "tokens_4096": (8, 4096, 16, 72),
}
HEADS = {"output_head": (8192, 1152, 1024), "discriminator_head": (8192, 3456, 384)}
CPU = {"warmup": 1, "repeats": 3, "steps": 2}
VARIANTS = {
    "card": {"job": "card", "name": "card", "warmup": 2, "repeats": 3, "steps": 5},
    "large": {
        **CPU,
        "overhead.repeats": 0,
        **{f"batch_per_device.{row}": 4 for row in ROWS},
        "flow.batch_per_device": 4,
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
        "flow.batch_per_device": 8,
        "flow.sampling_steps": 4,
        "card.device": "",
        "card.seconds": 3600.0,
        "card.row_seconds": 1800.0,
        "card.compilers": 2,
        "card.sampler.batch_per_device": 2,
        "card.sampler.steps": 2,
        "card.encode.batch_per_device": 2,
        "card.attention.variants": ("xla",),
        **{f"card.attention.shapes.{name}": (2, 16, 2, 8) for name in ATTENTION},
        **{f"card.heads.{name}": (32, 64, 16) for name in HEADS},
        "card.bias.dense": (64, 16),
        "card.bias.conv": (2, 16, 16, 8),
        "card.loader.batches": 2,
        "card.loader.jpegs": 16,
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
            flow=dict(stage="rfm_dit", batch_per_device=64, sampling_steps=50),
            card=dict(
                rows=names.CARD_ROWS,
                device="NVIDIA H",  # what the name of the device contains
                seconds=470.0,  # all rows together
                row_seconds=120.0,
                compilers=4,  # processes that compile steps before anything is measured
                again=False,  # measure also the rows that the workdir has
                ledger="",  # a JSON file that the rows are entered into, with a page beside it
                sampler=dict(batch_per_device=128, steps=50),
                encode=dict(batch_per_device=256),
                attention=dict(variants=("xla", "cudnn"), shapes=ATTENTION),
                heads=HEADS,
                bias=dict(dense=(32768, 1152), conv=(32, 256, 256, 128)),
                # More JPEGs than are kept decoded; 0 threads: one for each core.
                loader=dict(
                    data=dict(sae_stage1.get_config("tiny").data, crop="center", image_size=256),
                    batch_size=64,
                    batches=48,
                    jpegs=1200,
                ),
            ),
            compile_cache="",
        )
    )
    config.card.loader.data.threads = 0
    overhead = config.overhead.stage
    overhead.random_frozen_ok, overhead.data.source = ("vit", "lpips"), ""
    overhead.checkpoint.every = 2000  # the tiny stage's 10 are for short runs
    return config_lib.apply_variants(config, argument, VARIANTS)
