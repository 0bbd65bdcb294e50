"""Riemannian flow matching with DiT^DH (RAE's transformer with a wide head) on latents of stage 4.

DiT^DH-XL at 1024 channels, 840.0 M parameters: AdamW (0.9, 0.95) at 2e-4, batch 1024, 80 epochs,
EMA 0.9995, gradients clipped at norm 1. The 40 epochs of "warm-up" of RAE's schedule are constant
too, so the rate is constant here. The paper used 8 H100. Not run at full size.

    python -m dinosae_jax.main --config=configs/rfm_ddt.py

It starts from stage 4, runs/sae_stage4.

Variants: s, b, l, xl (sizes), rae (its 800 epochs, the rate falling after 40), qknorm, f32, tiny.
"""

from __future__ import annotations

from configs import rfm_dit
from dinosae_jax import config as config_lib
from dinosae_jax import sizes

VARIANTS = {
    **{
        name.lower(): {f"model.dit.{field}": value for field, value in size.items()}
        for name, size in sizes.DIT_DH.items()
    },
    "rae": rfm_dit.RAE,
    "qknorm": rfm_dit.VARIANTS["qknorm"],
    "f32": rfm_dit.VARIANTS["f32"],
    "tiny": {
        **rfm_dit.TINY_RUN,
        "model.dit.hidden_size": (96, 128),
        "model.dit.depth": (3, 1),
        "model.dit.num_heads": (4, 4),
    },
}


def get_config(argument=None):
    """DiT^DH-XL and its recipe."""
    config = config_lib.flow_defaults()
    config.name = "rfm_ddt"
    config.ema = 0.9995
    config.optimizer.clip_norm = 1.0
    config.model.dit = dict(
        model="DiTDH",
        input_size=16,
        in_channels=1024,
        **sizes.DIT_DH["XL"],
        num_classes=1000,
        class_dropout_prob=0.1,
        use_qknorm=False,
        scan_layers=True,
        remat="dots",
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
