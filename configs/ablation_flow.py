"""The flow's claim, measured small: sphere against Euclidean space, samplers, decode radius.

Arms with equal steps and network, three seeds each: {raw, projected} latents on linear paths, raw
latents on a trigonometric path, and the geodesic on the sphere (raw latents have no geodesic: they
do not lie on one sphere). Further ones, trained once, change one thing of the geodesic flow: the
radial penalty, the time shift, the moving average, the radius. All read the latents of the chain of
configs/imagenette.py:cpu in runs/imagenette, which is run first:

    python -m dinosae_jax.main --config=configs/ablation_flow.py \
        --config.base.data.source=folder:IMAGENETTE \
        --config.sweep.decoder=runs/imagenette/stage3 \
        --config.weights.efficientnet=weights/efficientnet

Samples of every arm are compared with held-out photographs: unguided and guided at the end, and
unguided at earlier steps. The geodesic flow is also sampled by every method, decoded at radii from
half to twice the measured norm, and by the decoder of `sweep.decoder` (stage 3: before latent
noise). Features are FID's with `weights.inception`, those of EfficientNet-Lite0 with
`weights.efficientnet`, else the mean patch token by the autoencoder's own encoder. A linear
classifier of these features says how many samples show their class. The Frechet distance is biased
by the number of samples: compare its values only with one another and with the row 'photographs',
training images in the place of samples.

Writes tables.md, scores.json, ablation_flow.png. More seeds or settings can be added to a finished
workdir; other numbers of steps or samples need another. Variants: tiny (two steps of one arm on
the embedded photographs around a random ViT).
"""

from __future__ import annotations

import ml_collections

from configs import imagenette, rfm_dit
from dinosae_jax import config as config_lib

ARMS = {
    "raw, linear": {"flow/path": "linear"},
    "raw, trigonometric": {"flow/path": "trigonometric"},
    "projected, linear": {"flow/path": "projected_linear"},
    "projected, geodesic": {"flow/path": "geodesic"},
}
ONCE = {
    "radial penalty": {"flow/radial_weight": 0.1},
    "shift 1": {"flow/time/shift": 1.0},
    "shift 3": {"flow/time/shift": 3.0},
    "EMA over 100 steps": {"ema": 0.99},
    "EMA over 2000 steps": {"ema": 0.9995},
    "radius 1": {"flow/radius": 1.0},
}
SAMPLERS = ("euler_projection", "rodrigues", "geodesic_midpoint", "geodesic_heun", "ab2", "dpm2m")
VARIANTS = {
    "tiny": {
        "seeds": (0,),
        "samples": 20,
        "images": 20,
        "known": 10,
        "batch_size": 20,
        "kernel_subset_size": 10,
        "order": ("projected, geodesic",),
        "once": ("shift 3",),
        "sweep.samplers": ("dpm2m",),
        "sweep.steps": (2,),
        "sweep.radii": (0.5, 1.0),
        **{f"base.{name}": value for name, value in rfm_dit.VARIANTS["tiny"].items()},
        "base.steps": 2,
        "base.eval.every": 2,
        "base.eval.samples": 0,
        "base.checkpoint.every": 1,
        "base.checkpoint.milestones": 1,
        "base.sampling.steps": 2,
        "base.data.latents": "",
        "base.model.vit.layers": (1,),
    }
}


def get_config(argument=None):
    """The flow's ablation; variants: tiny."""
    base = imagenette.get_config("cpu").stages.flow.copy_and_resolve_references()
    base.steps, base.sampling.steps, base.sampling.guidance = 2000, 25, 1.0
    base.eval.every, base.checkpoint.every = 1000, 500
    base.checkpoint.milestones = 500
    base.init_from, base.data.latents = "runs/imagenette/stage4", "runs/imagenette/latents"
    config = ml_collections.ConfigDict(
        dict(
            job="ablation",
            name="ablation_flow",
            base=base,
            arms=ARMS | ONCE,
            order=tuple(ARMS),
            once=tuple(ONCE),  # with the first seed alone
            seeds=(0, 1, 2),
            guidances=(1.0, 2.0),
            samples=500,  # of each setting; balanced over classes
            images=1200,  # held out
            known=2500,  # training images that classes are learned from
            batch_size=100,
            kernel_subsets=50,
            kernel_subset_size=250,
            # The first that is given makes the features; both empty: the encoder's own.
            weights=dict(inception="", efficientnet=""),
            sweep=dict(
                arm="projected, geodesic",
                samplers=SAMPLERS,
                steps=(5, 10, 25, 50),
                radii=(0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0),  # of the measured norm
                decoder="",  # an autoencoder whose decoder is tried
            ),
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
