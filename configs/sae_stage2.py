"""Stage 2: the same with a discriminator (paper, eq. 8).

Continues stage 1 with L1 + LPIPS + 0.5 cosine + 0.5 hinge GAN (DINO discriminator, adaptive
weight), AdamW at 1e-4 with betas (0.5, 0.9). 8 epochs here, the paper states no length. Not run
at full size.

    python -m dinosae_jax.main --config=configs/sae_stage2.py \
        --config.weights.dino=weights/dino

DINOv3 and LPIPS come along with stage 1, runs/sae_stage1.
"""

from __future__ import annotations

from configs import sae_base
from dinosae_jax import config as config_lib


def get_config(argument=None):
    """The paper's stage 2; variants: tiny."""
    config = config_lib.autoencoder_defaults()
    config.name = "sae_stage2"
    config.seed = 1
    config.init_from = "runs/sae_stage1"
    config.steps = config_lib.epochs(8, config.batch_size)
    config.losses.gan = 0.5
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1, config.optimizer.b2 = 0.5, 0.9
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    return config_lib.apply_variants(config, argument, {"tiny": sae_base.tiny_after("sae_stage1")})
