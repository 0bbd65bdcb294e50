"""Stage 4: the decoder learns to decode noisy latents (paper, eq. 10).

Continues stage 3 with sigma ~ U(0, 0.8) per image added to the tokens, AdamW at 5.4e-5; the
losses are stage 3's. 4 epochs here, the paper states no length. Not run at full size.

    python -m dinosae_jax.main --config=configs/sae_stage4.py

The frozen networks come along with stage 3, runs/sae_stage3.
"""

from __future__ import annotations

from configs import sae_base, sae_stage3
from dinosae_jax import config as config_lib


def get_config(argument=None):
    """The paper's stage 4; variants: tiny."""
    config = sae_stage3.get_config()
    config.name = "sae_stage4"
    config.seed = 3
    config.init_from = "runs/sae_stage3"
    config.steps = config_lib.epochs(4, config.batch_size)
    config.latent_noise.tau = 0.8
    config.optimizer.learning_rate = 5.4e-5
    return config_lib.apply_variants(config, argument, {"tiny": sae_base.tiny_after("sae_stage3")})
