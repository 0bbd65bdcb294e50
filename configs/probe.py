"""Linear probe of teacher and student in DINOv3's protocol (paper, Figure 3: 89/98 and 87/97).

Thirteen learning rates at once, SGD with momentum 0.9 and a cosine to zero, 12,500 steps of 1,024
images, random resized crops and flips; features are the class token and the mean patch token.
The paper gives neither resolution nor features, so both networks get this recipe. Held-out images
go through ADM's centre crop (DINOv3 resizes to 256 and cuts 224). Writes results.json, results.md.

    python -m dinosae_jax.main --config=configs/probe.py \
        --config.init_from=runs/sae_stage4

Variants: tiny (photographs; a random autoencoder where init_from is empty).
"""

from __future__ import annotations

from configs import sae_stage1
from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {
        "init_from": "",
        "random_frozen_ok": ("stem", "vit", "decoder"),
        "steps": 20,
        "batch_size": 16,
        "data.source": "photos/112",
        "data.image_size": 64,
        "data.threads": 2,
    }
}


def get_config(argument=None):
    """DINOv3's protocol; variants: tiny."""
    config = config_lib.measurement_defaults()
    config.update(dict(job="probe", name="probe", steps=12_500))
    config.batch_size = 1024
    config.data.image_size = 224
    config.data.crop = "random_resized"
    config.data.flip = True
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
