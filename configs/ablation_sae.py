"""The paper's claim, measured small: what alignment and the convolutional stem are worth.

Arms with equal steps and three seeds each around a pretrained ViT, at a size that a CPU trains:
cosine alignment with the convolutional stem, MSE alignment, no alignment, cosine with a plain
patch embedding, and the first without the norms over whole images. Stage 1 of
configs/imagenette.py:cpu, which says what the images and weights are.

    python -m dinosae_jax.main --config=configs/ablation_sae.py \
        --config.base.data.source=folder:IMAGENETTE --config.base.weights.vit=weights/vits \
        --config.weights.efficientnet=weights/efficientnet

Reports held-out PSNR, L1 and the cosine to the teacher (results.json, table.md, curves.png) and,
with a pretrained network in `weights`, perceptual and distribution distances, how well tokens and
decoded images tell the class, and what remains when norms are exchanged between images
(scores.json, tables.md; configs/evaluate.py says how to get the networks). More seeds or arms can
be added to a finished workdir.

Variants: long (four times the steps, without the last arm), tiny (two steps of two arms on the
embedded photographs, with a random ViT).
"""

from __future__ import annotations

import ml_collections

from configs import imagenette, quickstart, sae_base
from dinosae_jax import config as config_lib

# Tokens of this ViT have a mean square of 15.7 a channel, so that a squared error is 2 * 15.7 times
# 1 - cosine where norms are equal: this weight pulls directions as the cosine's 0.5 does.
MSE_WEIGHT = 0.016
CLAIM = {
    "cosine, conv stem": {},
    "MSE, conv stem": {"losses/cosine": 0.0, "losses/mse": MSE_WEIGHT},
    "no alignment, conv stem": {"losses/cosine": 0.0},
    "cosine, patch embedding": {"model/stem/kind": "patch", "without": ("model/stem/widths",)},
}
# The published stem and decoder normalise over whole images, which hides an image's contrast.
ARMS = CLAIM | {
    "cosine, conv stem, no norms": {
        f"model/{role}/{field}": value
        for role, fields in quickstart.WITHOUT_NORMS.items()
        for field, value in fields.items()
    },
}
VARIANTS = {
    "long": {
        "order": tuple(CLAIM),
        "base.steps": 2000,
        "base.eval.every": 500,
        "base.checkpoint.every": 500,
    },
    "tiny": {
        "seeds": (0,),
        "order": ("cosine, conv stem", "cosine, patch embedding"),
        "base.steps": 2,
        "base.eval.every": 2,
        "base.random_frozen_ok": ("vit",),
        "base.weights.vit": "",
        "base.data.source": "photos/112",
        "base.data.crop": "random",
        **{f"base.{name}": value for name, value in sae_base.TINY.items() if "model." in name},
        "base.model.vit.layers": (1,),
    },
}


def get_config(argument=None):
    """The autoencoder's ablation; variants: long, tiny."""
    base = imagenette.get_config("cpu").stages.stage1.copy_and_resolve_references()
    base.steps = 500
    base.eval.every, base.eval.images, base.checkpoint.every = 250, 400, 250
    config = ml_collections.ConfigDict(
        dict(
            job="ablation",
            base=base,
            arms=ARMS,
            order=tuple(ARMS),
            seeds=(0, 1, 2),
            metrics=("psnr", "l1", "cosine_similarity"),
            # The first that is given makes the features; both empty: no scores are computed.
            weights=dict(inception="", efficientnet=""),
            images=1200,  # held out
            known=2500,  # training images that classes are learned from
            batch_size=50,
            kernel_subsets=50,
            kernel_subset_size=600,
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
