"""Reconstructs a folder of images: side-by-side PNG files, PSNR, SSIM and, with weights, LPIPS.

    python -m dinosae_jax.main --config=configs/reconstruct.py \
        --config.images=photos --config.weights.lpips=weights/lpips

`init_from` is a stage's workdir (runs/sae_stage4 unless another is named), a checkpoint, an export
or converted weights (--kind=dinosae), whose `pixel_range` may be named (default imagenet).
`images` is a folder of images (or of folders of images), or a source of the data pipeline such as
'photos/112' or 'tfds:NAME', read at its split eval. Sides are cropped centrally to multiples of 16;
`short_side=256` resizes first. Variants: tiny (the embedded photographs, and a random tiny model
where init_from is empty).
"""

from __future__ import annotations

from configs import sae_stage1
from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {
        "init_from": "",
        "images": "photos/112",
        "random_frozen_ok": ("stem", "vit", "decoder"),
    },
}


def get_config(argument=None):
    """Reconstructions at the images' own sizes; variants: tiny."""
    config = config_lib.reconstruct_defaults()
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
