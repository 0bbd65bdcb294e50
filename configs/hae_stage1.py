"""Stage 1 of the second version's two-stage recipe: align and reconstruct for 20 epochs.

Batch 512; otherwise stage 1 of the first version. Not run at full size.

    python -m dinosae_jax.main --config=configs/hae_stage1.py \
        --config.weights.vit=weights/dinov3 --config.weights.lpips=weights/lpips
"""

from __future__ import annotations

from configs import sae_base, sae_stage1
from dinosae_jax import config as config_lib


def get_config(argument=None):
    """The second version's first stage; variants: tiny."""
    config = sae_stage1.get_config()
    config.name = "hae_stage1"
    config.batch_size = 512
    config.ema = 0.9975
    config.steps = config_lib.epochs(20, config.batch_size)
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    return config_lib.apply_variants(config, argument, {"tiny": sae_base.TINY})
