"""The paper's claim, measured small: what alignment and the convolutional stem are worth.

Four arms with equal steps and three seeds each, at a size that a CPU trains: cosine alignment
with the convolutional stem, MSE alignment, no alignment, and cosine with DINOv3's plain patch
embedding. Reports held-out PSNR, L1 and the cosine to the teacher.

    python -m dinosae_jax.main --config=configs/ablation_sae.py \
        --config.base.data.source=folder:PHOTOS

Variants: tiny (a few steps of two arms on the embedded photographs).
"""

from __future__ import annotations

import ml_collections

from configs import sae_stage1
from dinosae_jax import config as config_lib

ARMS = {
    "cosine, conv stem": {},
    "MSE, conv stem": {"losses/cosine": 0.0, "losses/mse": 0.5},
    "no alignment, conv stem": {"losses/cosine": 0.0},
    "cosine, patch embedding": {"model/stem/kind": "patch", "model/stem/widths": None},
}
VARIANTS = {
    "tiny": {
        "seeds": (0,),
        "order": ("cosine, conv stem", "cosine, patch embedding"),
        "base.steps": 2,
        "base.eval.every": 2,
        "base.data.source": "photos/112",
        "base.data.crop": "random",
        "base.data.holdout": 0,
    }
}


def get_config(argument=None):
    """The autoencoder's ablation; variants: tiny."""
    base = sae_stage1.get_config("tiny")
    base.steps = 500
    base.optimizer.schedule, base.optimizer.final_learning_rate = "cosine", 1e-4
    base.log_every, base.eval.every, base.checkpoint.every = 50, 100, 250
    base.eval.images, base.eval.batch_size = 100, 50
    base.data.source, base.data.holdout = "folder:photos", 5
    base.data.crop, base.data.resize = "resize_random", 80
    config = ml_collections.ConfigDict(
        dict(
            job="ablation",
            base=base,
            arms=ARMS,
            order=tuple(ARMS),
            seeds=(0, 1, 2),
            metrics=("psnr", "l1", "cosine_similarity"),
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
