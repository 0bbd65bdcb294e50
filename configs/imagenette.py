"""The whole chain around a pretrained ViT, on the photographs of ten classes of ImageNet.

    python -m dinosae_jax.main --config=configs/imagenette.py:cpu --workdir=runs/imagenette \
        --config.data.source=folder:IMAGENETTE --config.weights.vit=weights/vits

IMAGENETTE holds train/CLASS/ and val/CLASS/ with photographs of ten classes (fastai's imagenette;
ours have a short side of 224). The ViT is DINOv2's S/14 without registers, read after its ninth
block, where the paper has DINOv3 ViT-L; docs/ablations.md says where to get one. The flow is
trained on latents that a stage of the chain encodes once.

Neither LPIPS nor the discriminator's DINO come in a package, so LPIPS is left out and the
discriminator's frozen network is random.

No argument: 128 pixels, for one accelerator; not run. Variants: cpu (64 pixels, under three hours
of two cores), tiny (four steps of each stage on the embedded photographs, with a random ViT).
"""

from __future__ import annotations

import ml_collections

from configs import encode, quickstart, rfm_dit, sae_base
from dinosae_jax import config as config_lib

NOTES = (
    "Small networks around DINOv2 ViT-S/14, trained on 8,500 photographs of ten classes: these "
    "are not results of the paper's sizes.",
    "There is no LPIPS loss, and the discriminator looks with a frozen network of random weights.",
)
STAGES = tuple(quickstart.STAGES)  # of training
STEPS = {"stage1": 6000, "stage2": 1000, "stage3": 1000, "stage4": 2000, "flow": 20_000}
LEARNING_RATES = {"stage1": 1e-3, "stage2": 2e-4, "stage3": 2e-4, "stage4": 1e-4, "flow": 5e-4}
MODEL = {
    "model.vit.layers": (8,),
    "model.stem.widths": (48, 96, 192),
    "model.decoder.width_list": (32, 64, 128, 256, 256),
    "model.decoder.depth_list": (0, 1, 2, 2, 2),
}
AUTOENCODER = {
    **MODEL,
    "batch_size": 64,
    "ema": 0.995,
    "losses.lpips": 0.0,
    "log_every": 25,
    "eval.every": 500,
    "eval.batch_size": 50,
    "eval.images": 1200,
    "checkpoint.every": 500,
    "data.image_size": 128,
    "data.crop": "resize_random",
    "data.resize": 160,
    "data.threads": 8,
    "model.dino.patch_size": 16,
    "model.dino.embed_dim": 192,
    "model.dino.depth": 4,
    "model.dino.num_heads": 3,
    "model.dino.key_depths": (1, 3),
}
FLOW = {
    **MODEL,
    **{f"model.dit.{field}": value for field, value in rfm_dit.SIZES["s"].items()},
    "batch_size": 256,
    "ema": 0.999,
    "log_every": 100,
    "eval.every": 2000,
    "eval.batch_size": 50,
    "eval.images": 1200,
    "eval.samples": 0,
    "checkpoint.every": 1000,
    "flow.time.shift": 0.0,
    "sampling.guidance": 2.0,
    "data.latents": "latents",
    "data.image_size": 128,
    "data.crop": "center",
    "data.flip": True,
    "data.threads": 8,
    "model.dit.input_size": 8,
    "model.dit.num_classes": 10,
}
CPU = {
    "model.decoder.width_list": (16, 32, 64, 128, 256),
    "model.decoder.depth_list": (0, 1, 1, 1, 1),
    "data.image_size": 64,
    "data.threads": 2,
}
CPU_AUTOENCODER = {
    **CPU,
    "batch_size": 16,
    "ema": 0.99,
    "data.resize": 80,
    "model.dino.patch_size": 32,
    "model.dino.embed_dim": 96,
    "model.dino.depth": 2,
    "model.dino.key_depths": (1,),
}
CPU_FLOW = {
    **CPU,
    "batch_size": 64,
    "model.dit.input_size": 4,
    "model.dit.hidden_size": 256,
    "model.dit.depth": 6,
    "model.dit.num_heads": 4,
}
CPU_STEPS = {"stage1": 3000, "stage2": 300, "stage3": 300, "stage4": 1000, "flow": 6000}
TINY = {
    **{name: value for name, value in sae_base.TINY.items() if name.startswith("model.")},
    "model.vit.layers": (1,),
    "steps": 4,
    "batch_size": 16,
    "eval.every": 4,
    "checkpoint.every": 2,
    "data.image_size": 64,
    "data.threads": 2,
}
TINY_AUTOENCODER = {**TINY, "random_frozen_ok": ("vit", "dino"), "data.crop": "random"}
TINY_FLOW = {
    **{name: value for name, value in TINY.items() if not name.startswith("model.dino.")},
    **{n: value for n, value in rfm_dit.VARIANTS["tiny"].items() if n.startswith("model.dit.")},
}


def _of_stages(autoencoder, flow):
    """Dotted fields of the chain for fields of its stages."""
    return {
        f"stages.{name}.{field}": value
        for name in STAGES
        for field, value in (flow if name == "flow" else autoencoder).items()
    }


VARIANTS = {
    "cpu": {
        **_of_stages(CPU_AUTOENCODER, CPU_FLOW),
        **{f"stages.{name}.steps": steps for name, steps in CPU_STEPS.items()},
        "stages.latents.data.image_size": 64,
        "stages.latents.data.threads": 2,
    },
    "tiny": {
        **_of_stages(TINY_AUTOENCODER, TINY_FLOW),
        "stages.latents.data.image_size": 64,
        "stages.latents.data.threads": 2,
        "weights.vit": "",
        "data.source": "photos/112",
    },
}


def get_config(argument=None):
    """Four stages of the autoencoder, its latents and a class-conditional flow."""
    source = ml_collections.FieldReference("folder:imagenette")
    vit = ml_collections.FieldReference("weights/vits")
    stages = {}
    previous = ""
    for name, module in quickstart.STAGES.items():
        stage = module.get_config("tiny,dinov2_vits14")
        stage.update_from_flattened_dict(FLOW if name == "flow" else AUTOENCODER)
        stage.name, stage.init_from, stage.steps = name, previous, STEPS[name]
        stage.random_frozen_ok = ("dino",) if stage.get("losses", {}).get("gan") else ()
        stage.data.source = source
        stage.optimizer.learning_rate, stage.optimizer.warmup_steps = LEARNING_RATES[name], 50
        stage.optimizer.schedule, stage.optimizer.final_learning_rate = "cosine", 1e-5
        if name == "flow":
            stages["latents"] = _latents(stage, previous)
        stages[name], previous = stage, name
    stages["stage1"].weights.vit = vit
    config = ml_collections.ConfigDict(
        dict(
            job="train",
            chain=tuple(stages),
            stages=stages,
            notes=NOTES,
            data=dict(source=source),
            weights=dict(vit=vit),
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)


def _latents(flow, autoencoder):
    """The stage that encodes the images of a flow's stage."""
    stage = encode.get_config()
    stage.name, stage.init_from = "latents", autoencoder
    stage.data.update({field: flow.data[field] for field in stage.data if field != "source"})
    stage.data.source = flow.data.get_ref("source")
    return stage
