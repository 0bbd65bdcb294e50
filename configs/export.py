"""One folder with everything of an autoencoder (or of a flow and its autoencoder), to share it.

The moving averages of stem, ViT, decoder and diffusion transformer, the model config, the latent
convention and the notes; `Autoencoder.load` and every `init_from` read it. The workdir is the new
folder, which must be empty.

    python -m dinosae_jax.main --config=configs/export.py --workdir=exports/sae

`init_from` is a stage's workdir (runs/sae_stage4 unless another is named), a checkpoint, an export
or converted weights; `pixel_range` names what the decoder of converted weights emits (default
imagenet). `autoencoder` names the autoencoder of a converted flow, such as RAE's DiT^DH. The export
holds the manifest of the published weights in it; `permissive` refuses those with a licence that
binds what is derived. Variants: tiny (a random tiny model where init_from is empty).
"""

from __future__ import annotations

from configs import sae_stage1
from dinosae_jax import config as config_lib

VARIANTS = {"tiny": {"init_from": "", "random_frozen_ok": ("stem", "vit", "decoder")}}


def get_config(argument=None):
    """The export of `init_from`; variants: tiny."""
    config = config_lib.export_defaults()
    config.autoencoder = ""
    config.permissive = False
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
