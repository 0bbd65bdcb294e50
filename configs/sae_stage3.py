"""Stage 3: the encoder is frozen, the decoder refined (paper, eq. 9).

Continues stage 2 with L1 + LPIPS + 0.5 hinge GAN on the decoder alone, AdamW at 1e-4 with betas
(0.5, 0.9). 8 epochs here, the paper states no length. Not run at full size.

    python -m dinosae_jax.main --config=configs/sae_stage3.py

The frozen networks come along with stage 2, runs/sae_stage2.
"""

from __future__ import annotations

from configs import sae_base
from dinosae_jax import config as config_lib


def get_config(argument=None):
    """The paper's stage 3; variants: tiny."""
    config = config_lib.autoencoder_defaults()
    config.name = "sae_stage3"
    config.seed = 2
    config.init_from = "runs/sae_stage2"
    config.trainable = ("decoder",)
    config.steps = config_lib.epochs(8, config.batch_size)
    config.losses.cosine = 0.0
    config.losses.gan = 0.5
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1, config.optimizer.b2 = 0.5, 0.9
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    return config_lib.apply_variants(config, argument, {"tiny": sae_base.tiny_after("sae_stage2")})
