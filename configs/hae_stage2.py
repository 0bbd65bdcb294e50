"""Stage 2 of the second version's recipe: frozen encoder, GAN and latent noise together.

40 epochs at batch 512, AdamW at 5e-5 with betas (0.5, 0.9), EMA 0.9975; the discriminator trains
alone for the first 2 epochs; tau ramps from 0.8 to 1.2 over 20 epochs. Not run at full size.

    python -m dinosae_jax.main --config=configs/hae_stage2.py \
        --config.weights.dino=weights/dino

DINOv3 and LPIPS come along with stage 1, runs/hae_stage1.
"""

from __future__ import annotations

from configs import sae_base, sae_stage3
from dinosae_jax import config as config_lib

TINY = {
    **sae_base.tiny_after("hae_stage1"),
    "gan.start": 5,
    "latent_noise.ramp_steps": 10,
}


def get_config(argument=None):
    """The second version's second stage; variants: tiny."""
    config = sae_stage3.get_config()
    config.name = "hae_stage2"
    config.seed = 1
    config.init_from = "runs/hae_stage1"
    config.batch_size = 512
    config.ema = 0.9975
    config.steps = config_lib.epochs(40, config.batch_size)
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    config.gan.start = config_lib.epochs(2, config.batch_size)
    config.latent_noise.tau, config.latent_noise.tau_end = 0.8, 1.2
    config.latent_noise.ramp_steps = config_lib.epochs(20, config.batch_size)
    return config_lib.apply_variants(config, argument, {"tiny": TINY})
