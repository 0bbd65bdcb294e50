"""RAE's flow: DiT^DH on the linear path, on the normalised latents of RAE's autoencoder.

Latents have mean 0 and deviation 1 by the statistics that the autoencoder holds; the time
shift is sqrt(256 * 768 / 4096) = 6.93 for DINOv2-B. AdamW (0.9, 0.95) at 2e-4, batch 1024, 80
epochs, EMA 0.9995, gradients clipped at norm 1 (arXiv 2510.11690). Not run at full size.

    python -m dinosae_jax.main --config=configs/rae_dit.py --config.init_from=weights/rae

It starts from an autoencoder converted with --kind=rae_autoencoder, or trained by
configs/rae_decoder.py.

Variants: s, b, l, xl (sizes), rae (its 800 epochs), the encoders; tiny.
"""

from __future__ import annotations

from configs import rae_decoder, rfm_ddt
from dinosae_jax import config as config_lib

DECODER = {n: v for n, v in rae_decoder.TINY.items() if n.startswith(("model.decoder", "model.s"))}
VARIANTS = {
    **{name: value for name, value in rfm_ddt.VARIANTS.items() if name != "tiny"},
    "tiny": {
        **{
            name: value
            for name, value in rfm_ddt.VARIANTS["tiny"].items()
            if not name.startswith(("model.decoder", "model.stem"))
        },
        **DECODER,
    },
}


def get_config(argument=None):
    """RAE's DiT^DH-XL and its recipe around DINOv2-B; variants: see the description."""
    config = rfm_ddt.get_config()
    config.name = "rae_dit"
    config.init_from = "runs/rae_decoder"
    config.flow.path = "linear"
    source = rae_decoder.get_config()
    config.model.stem = source.model.stem
    config.model.decoder = source.model.decoder
    config_lib.use_encoder(config, "rae_dinov2_vitb14_reg")
    return config_lib.apply_variants(config, argument, VARIANTS)
