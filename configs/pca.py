"""Feature maps of teacher and student as colours, side by side (paper, Figure 4).

Three principal components of the patch tokens, fitted on the teacher and used for both, so that
a flipped sign does not look like a difference. Writes pca.png.

    python -m dinosae_jax.main --config=configs/pca.py \
        --config.init_from=runs/sae_stage1

Variants: tiny (photographs; a random autoencoder where init_from is empty).
"""

from __future__ import annotations

from configs import sae_stage1
from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {
        "init_from": "",
        "random_frozen_ok": ("stem", "vit", "decoder"),
        "count": 6,
        "data.source": "photos/256",
        "data.image_size": 128,
    }
}


def get_config(argument=None):
    """Eight held-out images at 512 pixels, 32 x 32 tokens; variants: tiny."""
    config = config_lib.measurement_defaults()
    config.update(dict(job="pca", name="pca", count=8, fitted_on="teacher"))  # teacher | joint
    config.batch_size = 8
    config.data.image_size = 512
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
