"""Riemannian flow matching with LightningDiT on the latents of stage 4 (paper, section 3.4).

RAE's form of LightningDiT-XL/1 on 256 tokens of 1024 channels: AdamW (0.9, 0.95) at a constant
2e-4, batch 1024, 80 epochs, EMA 0.9999, no clipping. The radius of the flow is sqrt(1024) = 32 and
the time shift 8; the decode radius is measured at the start. The paper used 8 H100. Not run at
full size.

    python -m dinosae_jax.main --config=configs/rfm_dit.py

It starts from stage 4, runs/sae_stage4.

Variants: s, b, l, xl (sizes), rae (its EMA, clipping and 800-epoch schedule), qknorm, f32, tiny.
"""

from __future__ import annotations

from configs import sae_base
from dinosae_jax import config as config_lib
from dinosae_jax import sizes

SIZES = {name.lower(): sizes.LIGHTNING_DIT[name] for name in ("S", "B", "L", "XL")}
# RAE's recipe for either network: constant for 40 epochs, then linear to a tenth at epoch 800.
RAE = {
    "ema": 0.9995,
    "steps": config_lib.epochs(800, 1024),
    "optimizer.clip_norm": 1.0,
    "optimizer.schedule": "linear",
    "optimizer.decay_start": config_lib.epochs(40, 1024),
    "optimizer.final_learning_rate": 2e-5,
}
# On ten photographs at a small crop, with a random autoencoder where init_from is empty.
TINY_RUN = {
    **{name: value for name, value in sae_base.TINY.items() if name.startswith("model.")},
    **{name: value for name, value in sae_base.TINY.items() if name.startswith(("eval.", "data."))},
    "steps": 20,
    "batch_size": 64,
    "ema": 0.99,
    "init_from": "",
    "random_frozen_ok": ("stem", "vit", "decoder"),
    "optimizer.learning_rate": 2e-3,
    "log_every": 5,
    "eval.samples": 16,
    "checkpoint.every": 10,
    "flow.time.shift": 6.0,  # ten photographs part early: at 2 a class draws another's
    "data.source": "photos/72",
    "data.crop": "center",  # one view of each, which a short run learns
    "data.flip": False,
    "model.dit.input_size": 4,
    "model.dit.in_channels": 64,
    "model.dit.num_classes": 10,
    "model.dit.remat": "none",
}
for _field in [name for name in TINY_RUN if name.startswith("model.dino.")]:
    del TINY_RUN[_field]
VARIANTS = {
    **{
        name: {f"model.dit.{field}": value for field, value in size.items()}
        for name, size in SIZES.items()
    },
    "rae": RAE,
    "qknorm": {"model.dit.use_qknorm": True},
    "f32": {"dtype": "float32"},
    "tiny": {
        **TINY_RUN,
        "model.dit.hidden_size": 128,
        "model.dit.depth": 4,
        "model.dit.num_heads": 4,
    },
}


def get_config(argument=None):
    """LightningDiT-XL/1 and its recipe."""
    config = config_lib.flow_defaults()
    config.name = "rfm_dit"
    return config_lib.apply_variants(config, argument, VARIANTS)
