"""The `tiny` variant of the autoencoder's stages, for a CPU."""

from __future__ import annotations

# The real networks at small width, on the embedded photographs: under a minute on two cores.
TINY = {
    "steps": 20,
    "batch_size": 16,
    "optimizer.learning_rate": 3e-3,  # the paper's 1e-5 leaves a tiny model at the mean colour
    "optimizer.warmup_steps": 0,
    "ema": 0.98,  # a short run: the paper's 0.9978 would lag behind
    "losses.lpips": 0.0,
    "random_frozen_ok": ("vit", "dino"),
    "log_every": 5,
    "eval.every": 10,
    "eval.batch_size": 16,
    "eval.images": 64,
    "checkpoint.every": 10,
    "model.stem.embed_dim": 64,
    "model.stem.widths": (16, 32, 64),
    "model.vit.embed_dim": 64,
    "model.vit.depth": 2,
    "model.vit.num_heads": 4,
    "model.vit.ffn_hidden": 256,
    "model.decoder.latent_channels": 64,
    "model.decoder.width_list": (16, 16, 32, 64, 64),
    "model.decoder.depth_list": (0, 1, 1, 1, 1),
    "model.dino.patch_size": 32,
    "model.dino.embed_dim": 32,
    "model.dino.depth": 2,
    "model.dino.num_heads": 2,
    "model.dino.key_depths": (1,),
    "data.source": "photos/112",
    "data.image_size": 64,
    "data.crop": "random",
    "data.threads": 2,
}


def tiny_after(stage):
    """The `tiny` variant of a stage that fine-tunes the tiny model of an earlier one."""
    return {**TINY, "optimizer.learning_rate": 5e-4, "init_from": f"runs/{stage}_tiny"}
