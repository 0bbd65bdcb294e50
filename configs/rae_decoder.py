"""RAE's first stage: a ViT decoder is trained on the latents of a frozen encoder.

The encoder sees the image with its own patches and is never trained; there is no stem. Mean and
variance of its latents are measured at the start (RAE: over all images, here over 10,000) and
travel with the decoder, for the flow. Decoder ViT-XL (28 blocks of width 1152), L1 + LPIPS + 0.75
GAN on latents with noise (tau 0.8), AdamW at 2e-4 with betas (0.5, 0.9), a cosine to 2e-5, batch
512, 16 epochs, EMA 0.9978; the discriminator starts at epoch 6 and the GAN at epoch 8 (arXiv
2510.11690). Not run at full size.

    python -m dinosae_jax.main --config=configs/rae_decoder.py \
        --config.weights.vit=weights/dinov2 --config.weights.lpips=weights/lpips \
        --config.weights.dino=weights/dino

Variants: every encoder, such as rae_siglip2_vitb16 (rae_dinov2_vitb14_reg without one); tiny.
"""

from __future__ import annotations

from configs import sae_base
from dinosae_jax import config as config_lib
from dinosae_jax import sizes

TINY = {
    **{n: v for n, v in sae_base.TINY.items() if not n.startswith(("model.decoder", "model.stem"))},
    "model.stem.embed_dim": 64,
    "model.decoder.latent_channels": 64,
    "model.decoder.grid": 4,
    "model.decoder.statistics_side": 4,
    "model.decoder.hidden_size": 64,
    "model.decoder.depth": 2,
    "model.decoder.num_heads": 4,
    "model.decoder.ffn_hidden": 128,
    "gan.start": 10,
    "gan.disc_start": 5,
}


def get_config(argument=None):
    """RAE's recipe around DINOv2-B with registers; variants: tiny, the encoders."""
    config = config_lib.autoencoder_defaults()
    config.name = "rae_decoder"
    config.trainable = ("decoder",)
    config.batch_size = 512
    config.steps = config_lib.epochs(16, config.batch_size)
    config.losses.update(dict(cosine=0.0, gan=0.75))
    config.latent_noise.tau = 0.8
    config.gan.disc_start = config_lib.epochs(6, config.batch_size)
    config.gan.start = config_lib.epochs(8, config.batch_size)
    config.optimizer.update(dict(learning_rate=2e-4, b1=0.5, b2=0.9, schedule="cosine"))
    config.optimizer.final_learning_rate = 2e-5
    config.optimizer.warmup_steps = config_lib.epochs(1, config.batch_size)
    config.model.stem = dict(kind="patch", embed_dim=768, patch_size=14)
    grid = sizes.RAE_DECODER["XL"]["grid"]
    config.model.decoder = dict(
        sizes.RAE_DECODER["XL"], statistics="variance", statistics_side=grid
    )
    config_lib.use_encoder(config, "rae_dinov2_vitb14_reg")
    return config_lib.apply_variants(config, argument, {"tiny": TINY})
