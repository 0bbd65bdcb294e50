"""Writes the latents of an image set as a cache, which the flow then reads instead of encoding.

    python -m dinosae_jax.main --config=configs/encode.py
    python -m dinosae_jax.main --config=configs/rfm_dit.py --config.data.latents=runs/encode

`init_from` is the autoencoder, runs/sae_stage4 unless another is named.

ADM's centre crop of each image and, where `data.flip` is set, of its mirror image (encoded, not
mirrored tokens). `format` is bfloat16 (ImageNet at 256 pixels, both ways: 1.34 TB) or int8 (8-bit
directions with one float16 norm per token: 0.67 TB). The manifest holds the mean token norm, which
is the decode radius, the encoder's hash, and the image recipe; a flow with another encoder or
recipe refuses the cache.
Run again, it checks every shard and writes those that are missing or damaged. Variants: int8, tiny
(the embedded photographs, and a random tiny autoencoder where init_from is empty; read it with
`rfm_dit.py:tiny --config.data.latents=DIR`).
"""

from __future__ import annotations

from configs import sae_stage1
from dinosae_jax import config as config_lib

VARIANTS = {
    "int8": {"format": "int8"},
    "tiny": {
        "init_from": "",
        "random_frozen_ok": ("stem", "vit", "decoder"),
        "batch_size": 8,
        "data.source": "photos/72",
        "data.image_size": 64,
        "data.flip": False,
        "data.threads": 2,
    },
}


def get_config(argument=None):
    """The flow's image recipe in bfloat16; variants: int8, tiny."""
    config = config_lib.measurement_defaults()
    config.update(
        dict(
            job="encode",
            name="encode",
            format="bfloat16",  # bfloat16 | int8
            num_shards=0,  # 0: shards of about 1 GiB
        )
    )
    config.data = config_lib.flow_defaults().data
    del config.data.latents
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
