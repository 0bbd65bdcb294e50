"""The flow of the paper's second version (Hyperspherical Autoencoder, arXiv 2601.22904v2).

LightningDiT-XL/1 in float32 on the sphere of radius 32 with shift 8 and a radial penalty of 0.1;
EMA 0.9995; sampled by Rodrigues' exponential map in 50 steps and decoded at radius 14. Its gFID
after 80 epochs is 2.65 without guidance. Not run at full size.

    python -m dinosae_jax.main --config=configs/hae_dit.py

It starts from runs/hae_stage2.

Variants: s, b, l, xl (sizes), tiny.
"""

from __future__ import annotations

from configs import rfm_dit
from dinosae_jax import config as config_lib

VARIANTS = {
    **{name: rfm_dit.VARIANTS[name] for name in rfm_dit.SIZES},
    "tiny": {**rfm_dit.VARIANTS["tiny"], "flow.radius": 8.0, "flow.decode_radius": 0.0},
}


def get_config(argument=None):
    """The second version's values."""
    config = config_lib.flow_defaults()
    config.name = "hae_dit"
    config.init_from = "runs/hae_stage2"
    config.dtype = "float32"
    config.ema = 0.9995
    config.flow.radius = 32.0
    config.flow.time.shift = 8.0
    config.flow.radial_weight = 0.1
    config.flow.decode_radius = 14.0
    config.sampling.sampler = "rodrigues"
    return config_lib.apply_variants(config, argument, VARIANTS)
