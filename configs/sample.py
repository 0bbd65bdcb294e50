"""Samples of a trained flow: PNG files, a grid, and the .npz that the ADM evaluation suite reads.

50 images of each class by the flow's own sampler, steps and guidance; any of them can be given.

    python -m dinosae_jax.main --config=configs/sample.py \
        --config.init_from=runs/rfm_dit --config.sampling.steps=50

`labels` is 'balanced', 'all', 'random' or numbers joined by commas (`--config.labels=3,3,207`);
`count` cuts or repeats them. `--config.sampling.guidance=1.42` guides, away from the flow of
`--config.weaker=runs/rfm_dit_s` where one is named (autoguidance), otherwise from no label.
`--config.png=False` leaves the PNG files out.
Variants: tiny (20 images; a random flow where init_from is empty).
"""

from __future__ import annotations

from configs import rfm_dit
from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {
        "init_from": "",
        "count": 20,
        "batch_per_device": 16,
        "chunk": 16,
        "sampling.steps": 10,
        "random_frozen_ok": ("stem", "vit", "decoder", "dit"),
    }
}


def get_config(argument=None):
    """FID's 50 images per class; variants: tiny."""
    config = config_lib.sample_defaults()
    config.random_flow = rfm_dit.get_config("tiny")
    return config_lib.apply_variants(config, argument, VARIANTS)
