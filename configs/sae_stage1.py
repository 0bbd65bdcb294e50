"""Stage 1: align the student with the teacher and reconstruct (paper, eq. 7).

Trains stem and decoder through the frozen ViT with L1 + LPIPS + 0.5 cosine alignment, AdamW at
1e-5, batch 256. The paper used 8 A100-40GB and states no length; 16 epochs here. Not run at full
size.

    python -m dinosae_jax.main --config=configs/sae_stage1.py \
        --config.weights.vit=weights/dinov3 --config.weights.lpips=weights/lpips
"""

from __future__ import annotations

from configs import sae_base
from dinosae_jax import config as config_lib


def get_config(argument=None):
    """The paper's stage 1; variants: tiny."""
    config = config_lib.autoencoder_defaults()
    config.name = "sae_stage1"
    config.steps = config_lib.epochs(16, config.batch_size)
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    return config_lib.apply_variants(config, argument, {"tiny": sae_base.TINY})
