"""The flow's claim, measured small: sphere against Euclidean space, samplers, decode radius.

Arms with equal steps and network: {raw, projected} latents on linear paths, raw latents on a
trigonometric path, and the geodesic on the sphere (raw latents have no geodesic: they do not lie on
one sphere). All share one tiny autoencoder, trained here around a random ViT whose last affine part
is drawn at random, so that token norms differ. Data: random 64-pixel crops of the ten embedded
photographs at a short side of 72, one class each: little enough that tiny flows draw them, and the
distribution of the crops is what they are compared by. (At 112 they draw palettes.) One trained
flow is then sampled by every method, and decoded at radii from half to twice the measured norm.

Frechet and kernel distance are between features of samples and of fresh crops, in a space that the
tables name. With `weights.inception` the features are FID's, with `weights.efficientnet` those of
EfficientNet-Lite0, pretrained on ImageNet-1k (configs/evaluate.py says how to make the weights).
Without both they are the mean patch token by that autoencoder's own encoder: a fixed space, not a
pretrained one. The Frechet distance is biased by the number of samples, so that its values compare
only with one another and with the row 'real crops'. Samples and crops are balanced over the
classes, so that the kernel distance of equal distributions is a little below zero, as that row
shows.

    python -m dinosae_jax.main --config=configs/ablation_flow.py \
        --config.weights.efficientnet=weights/efficientnet

Writes tables.md, scores.json, ablation_flow.png. More seeds or settings can be added to a finished
workdir; other numbers of steps or samples need another. Variants: tiny (two steps of one arm).
"""

from __future__ import annotations

import ml_collections

from configs import rfm_dit, sae_stage1
from dinosae_jax import config as config_lib

ARMS = {
    "raw, linear": {"flow/path": "linear"},
    "raw, trigonometric": {"flow/path": "trigonometric"},
    "projected, linear": {"flow/path": "projected_linear"},
    "projected, geodesic": {"flow/path": "geodesic"},
}
SAMPLERS = ("euler_projection", "rodrigues", "geodesic_midpoint", "geodesic_heun", "ab2", "dpm2m")
VARIANTS = {
    "tiny": {
        "seeds": (0,),
        "samples": 40,
        "reference": 80,
        "kernel_subset_size": 20,
        "autoencoder.steps": 2,
        "autoencoder.eval.every": 2,
        "base.steps": 2,
        "base.eval.every": 2,
        "base.sampling.steps": 2,
        "order": ("projected, geodesic",),
        "sweep.samplers": ("dpm2m",),
        "sweep.steps": (2,),
        "sweep.radii": (0.5, 1.0),
        "sweep.radius_steps": 2,
    }
}


def get_config(argument=None):
    """The flow's ablation; variants: tiny."""
    autoencoder = sae_stage1.get_config("tiny")
    autoencoder.steps, autoencoder.data.source = 800, "photos/72"
    autoencoder.eval.every, autoencoder.checkpoint.every = 800, 200
    base = rfm_dit.get_config("tiny")
    base.steps, base.batch_size = 550, 32
    base.data.crop, base.flow.time.shift = "random", 2.0
    base.eval.samples = 0  # samples of all arms are measured at the end
    base.log_every, base.eval.every, base.checkpoint.every = 50, 550, 550
    base.random_frozen_ok = ()
    for stage in (autoencoder, base):
        stage.optimizer.schedule, stage.optimizer.final_learning_rate = "cosine", 1e-4
    config = ml_collections.ConfigDict(
        dict(
            job="ablation",
            name="ablation_flow",
            autoencoder=autoencoder,
            base=base,
            arms=ARMS,
            order=tuple(ARMS),
            seeds=(0, 1, 2),
            samples=200,  # of each arm, and of each setting of the sweeps; balanced over classes
            reference=1000,
            kernel_subsets=50,
            kernel_subset_size=100,
            # The first that is given makes the features; both empty: the encoder's own.
            weights=dict(inception="", efficientnet=""),
            sweep=dict(
                arm="projected, geodesic",
                samplers=SAMPLERS,
                steps=(5, 10, 25, 50),
                radii=(0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0),  # of the measured norm
                radius_steps=25,
            ),
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
