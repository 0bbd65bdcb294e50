"""Defaults of every job; the rules between the fields are in `rules.py`.

A config file starts from one of the `*_defaults` functions, changes what differs, and ends with
`apply_variants`. Library code reads fields as `config.x`; defaults live here and nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from dinosae_jax import encoders, names, rules, sizes, spelling

# What a finished run may change when it is continued in the same workdir.
CONTINUABLE = (
    "steps",
    "log_every",
    "eval",
    "checkpoint",
    "compile_cache",
    "profile_steps",
    "on_mismatch",
    "data.threads",
    "data.workers",
    "data.data_dir",
    "data.latents",  # another place of the same cache
    "mesh",
)
# What names inputs. Compared by what is there, so that a moved folder is still the same.
PLACES = ("init_from", "weights", "data.source")


# Where the runs that others start from go by default; see `config_files.default_workdir`.
AUTOENCODER_RUN = "runs/sae_stage4"
FLOW_RUN = "runs/rfm_dit"


def epochs(count: float, batch_size: int) -> int:
    """Steps of `count` passes over ImageNet-1K's training images, incomplete batches dropped."""
    return int(count * (names.IMAGENET_TRAIN_IMAGES // batch_size))


def optimizer_defaults() -> ml_collections.ConfigDict:
    """AdamW at a constant rate after a linear warm-up; see `train/optim.py` for the meaning."""
    return ml_collections.ConfigDict(
        dict(
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # 0: no clipping
            warmup_steps=0,
            schedule="constant",  # constant | cosine | linear
            decay_start=0,
            final_learning_rate=0.0,
        )
    )


def run_defaults() -> ml_collections.ConfigDict:
    """What every training run has, whatever it trains."""
    return ml_collections.ConfigDict(
        dict(
            job="train",
            name="",
            seed=0,
            dtype="auto",  # auto: bfloat16 on accelerators, float32 on CPU
            # Of products of float32 factors, as in jax.lax.Precision: 'default' rounds them to
            # bfloat16 on a TPU and TF32 on a GPU, 'highest' is float32 (six times the work on a
            # TPU). auto: highest; for `compute` default where dtype is bfloat16.
            matmul_precision=dict(compute="auto", output_head="auto", discriminator_heads="auto"),
            steps=1,
            batch_size=256,
            accumulation=1,
            optimizer=optimizer_defaults(),
            ema=0.9978,
            init_from="",
            weights=dict(vit="", lpips="", dino=""),
            random_frozen_ok=(),
            skip_limit=20,  # steps in a row with a non-finite loss or gradient before the run stops
            log_every=100,
            eval=dict(every=5000, batch_size=64, images=1024),
            checkpoint=dict(
                every=2000,
                keep=2,  # the newest so many
                milestones=0,  # n: those whose step is a multiple of n are kept for ever; 0: none
            ),
            mesh=dict(fsdp=1),
            # Folder of compiled programs that later runs read; auto: ~/.cache/dinosae_jax; "": none
            compile_cache="auto",
            profile_steps="",  # '10:13' traces steps 10, 11 and 12 into workdir/profile
            # refuse | continue: in a workdir that holds another config; restart: at step 0 in one
            # whose checkpoints are damaged or gone
            on_mismatch="refuse",
        )
    )


def export_defaults() -> ml_collections.ConfigDict:
    """What every job has that reads one autoencoder: export, reconstruct."""
    return ml_collections.ConfigDict(
        dict(
            job="export",
            name="export",
            seed=0,
            init_from=AUTOENCODER_RUN,  # workdir, checkpoint, export or conversion
            pixel_range="",  # what the decoder of converted weights emits
            random_frozen_ok=(),
            random_model=dict(),  # a model config that is drawn at random where source is empty
            compile_cache="auto",
        )
    )


def reconstruct_defaults() -> ml_collections.ConfigDict:
    """Reconstructions of a folder of images by one autoencoder."""
    config = export_defaults()
    config.update(
        dict(
            job="reconstruct",
            name="reconstruct",
            dtype="auto",
            images="",  # a folder, or a source of the data pipeline
            data_dir="",
            short_side=0,  # pixels that the short side is resized to; 0 keeps every size
            batch_size=16,
            weights=dict(lpips=""),
        )
    )
    return config


def vit_large() -> dict[str, Any]:
    """DINOv3 ViT-L/16, its fields in the open so that a flag can change each."""
    return {**sizes.VIT["dinov3_vitl16"], "scan_layers": True, "remat": "none"}


def dino_small_8() -> dict[str, Any]:
    """The discriminator's trunk, DINO v1 ViT-S/8, and the blocks that its heads look at."""
    return {**sizes.DINO["S_8"], "key_depths": (2, 5, 8, 11)}


def autoencoder_defaults() -> ml_collections.ConfigDict:
    """One stage of the autoencoder; stage 1 of the paper unless a config says otherwise."""
    config = run_defaults()
    config.update(
        dict(
            trainable=("stem", "decoder"),
            losses=dict(l1=1.0, lpips=1.0, cosine=0.5, mse=0.0, gan=0.0),
            latent_noise=dict(tau=0.0, tau_end=0.0, ramp_steps=0),
            gan=dict(start=0, disc_start=0),
            model=dict(
                stem=dict(sizes.STEM),
                vit=vit_large(),
                decoder=dict(sizes.DECODER["A"]),
                dino=dino_small_8(),
                pixel_range="imagenet",
            ),
            data=dict(
                source="tfds:imagenet2012",
                data_dir="",
                image_size=256,
                crop="resize_random",
                resize=384,
                flip=False,
                holdout=0,  # n: every n-th image of a set without splits is for evaluation
                threads=16,
                workers=0,
            ),
        )
    )
    return config


def lightning_dit_xl() -> dict[str, Any]:
    """LightningDiT-XL/1 in RAE's form on 256 tokens of 1024 channels (`models.dit`)."""
    return dict(
        model="LightningDiT",
        time_embedding="fourier",
        input_size=16,
        patch_size=1,
        in_channels=1024,
        **sizes.LIGHTNING_DIT["XL"],
        num_classes=1000,
        class_dropout_prob=0.1,  # the rate of label dropout; 0 for a model without a null label
        use_qknorm=False,
        scan_layers=True,
        remat="dots",
    )


def flow_defaults() -> ml_collections.ConfigDict:
    """The flow on the latents of a trained, frozen autoencoder; RAE's LightningDiT-XL recipe."""
    config = run_defaults()
    del config.weights  # the frozen networks come from init_from
    config.update(
        dict(
            trainable=("dit",),
            batch_size=1024,
            ema=0.9999,
            seed=4,  # behind those of the four stages
            init_from=AUTOENCODER_RUN,
            flow=dict(
                path="geodesic",
                radius=0.0,  # of the flow's sphere; 0: sqrt(width)
                decode_radius=0.0,  # token norm given to the decoder; 0: measured at the start
                time=dict(
                    distribution="logit-normal",
                    mu=0.0,
                    sigma=1.0,
                    shift=0.0,  # 0: max(1, sqrt(tokens * width / 4096))
                    max_time=0.999,
                ),
                radial_weight=0.0,
                jacobi="",  # '' | noise | data, see flow/matching.py
            ),
            sampling=dict(sampler="euler_projection", steps=50, guidance=1.0, interval=(0.0, 1.0)),
            model=dict(
                stem=dict(sizes.STEM),
                vit=vit_large(),
                decoder=dict(sizes.DECODER["A"]),
                dit=lightning_dit_xl(),
                pixel_range="imagenet",
            ),
            data=dict(
                source="tfds:imagenet2012",
                data_dir="",
                latents="",  # a cache that configs/encode.py wrote; empty: encode every batch
                image_size=256,
                crop="center",
                resize=0,
                flip=True,
                holdout=0,
                threads=16,
                workers=0,
            ),
        )
    )
    config.eval.samples = 1024  # drawn at each evaluation for KID; 0: none
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.95
    config.steps = epochs(80, config.batch_size)
    return config


def sample_defaults() -> ml_collections.ConfigDict:
    """Samples of a trained flow; a sampling field left at None takes the flow's own value."""
    return ml_collections.ConfigDict(
        dict(
            job="sample",
            name="sample",
            seed=0,
            dtype="auto",
            init_from=FLOW_RUN,  # workdir, checkpoint or export of a flow
            weaker="",  # of another one, for autoguidance instead of classifier-free guidance
            random_frozen_ok=(),
            random_flow=dict(),  # a flow config that is drawn at random where init_from is empty
            labels="balanced",  # balanced | all | random | label numbers joined by commas
            count=0,  # 0: 50 of each class, one of each class, -, as many as are listed
            batch_per_device=64,
            chunk=1024,  # images between two saves
            png=True,  # also a PNG file of each image, in images/
            sampling=dict(
                sampler=config_dict.placeholder(str),
                steps=config_dict.placeholder(int),
                guidance=config_dict.placeholder(float),
                interval=config_dict.placeholder(tuple),
                decode_radius=config_dict.placeholder(float),
            ),
            compile_cache="auto",
        )
    )


def measurement_defaults() -> ml_collections.ConfigDict:
    """What the jobs that measure trained weights share: evaluate, probe, pca."""
    return ml_collections.ConfigDict(
        dict(
            name="",
            seed=0,
            dtype="auto",
            init_from=AUTOENCODER_RUN,  # workdir, checkpoint, export or conversion
            random_frozen_ok=(),
            random_model=dict(),  # a model config that is drawn at random where init_from is empty
            batch_size=64,
            data=dict(
                source="tfds:imagenet2012",
                data_dir="",
                image_size=256,
                crop="center",
                resize=0,
                flip=False,
                holdout=0,
                threads=16,
                workers=0,
            ),
            compile_cache="auto",
        )
    )


def apply_variants(
    config: ml_collections.ConfigDict,
    argument: str | None,
    variants: Mapping[str, Mapping[str, Any]],
) -> ml_collections.ConfigDict:
    """Applies the variants named in a config argument, `configs/X.py:tiny,fast`.

    The published encoders (`encoders.NETWORKS`) are variants of every config with a model:
    `configs/sae_stage1.py:dinov2_vitb14_reg`.

    Args:
      config: changed in place.
      argument: variant names joined by commas; None or empty for the paper's values.
      variants: name -> {dotted field: value}.

    Returns:
      The config.

    Raises:
      ValueError: a name that is not in `variants`.
    """
    for name in filter(None, (argument or "").split(",")):
        if name in encoders.NETWORKS and "model" in config:
            use_encoder(config, name)
            continue
        if name not in variants:
            hint = spelling.nearest(name, variants)
            raise ValueError(f"a config argument names variants; got {name!r}{hint}")
        config.update_from_flattened_dict(dict(variants[name]))
    return config


def use_encoder(config: ml_collections.ConfigDict, network: str) -> None:
    """Puts a published encoder in the place of DINOv3 ViT-L, in place.

    Sets the family, the fields of model.vit, and the widths of what is around it.

    Args:
      config: of a stage or flow; it has `model`.
      network: a key of `encoders.NETWORKS`.
    """
    model, family = config.model, encoders.NETWORKS[network][0]
    fields = encoders.vit_fields(network)
    width = fields["embed_dim"]
    with config.unlocked(), model.ignore_type():
        model.vit.update(
            {name: value for name, value in encoders.DINOV3.items() if name in model.vit}
        )
        model.vit.update(fields if family == "dinov3" else {"layers": (), **fields})
        model.stem.embed_dim = model.decoder.latent_channels = width
        if model.stem.get("kind") == "patch":
            model.stem.patch_size = fields.get("patch_size", names.PATCH_SIZE)
        if "dit" in model:
            model.dit.in_channels = width
        if family != "dinov3" or "encoder" in model:
            model.encoder = family
        if model.decoder.get("kind", "conv") == "conv" and model.decoder.width_list[-1] % width:
            model.decoder.in_shortcut = None  # a duplicating one needs a divisor of its width


def frozen_networks(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The published networks that a stage uses frozen: of vit, lpips and dino, what it needs.

    A stage reads them from `weights.*`, where `init_from` does not bring them along. A flow's
    come with its autoencoder.
    """
    if "losses" not in config:
        return ()
    losses = config.losses
    needed = {"vit": True, "lpips": losses.lpips > 0, "dino": losses.gan > 0}
    return tuple(role for role, is_needed in needed.items() if is_needed)


def expand_home(config: ml_collections.ConfigDict) -> None:
    """Replaces `~` by the home folder in every path of a config, also in `folder:~/x`, in place."""
    with config.unlocked():
        for field, value in list(rules.leaves(config)):
            if isinstance(value, str) and "~" in value:
                kind, colon, path = value.rpartition(":")
                whole = f"{kind}{colon}{os.path.expanduser(path)}"
                config.update_from_flattened_dict({field: whole})


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as sorted, indented JSON, the form that every workdir keeps."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Lines `field: ours != theirs` for every leaf in which two JSON-like trees differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        lines = []
        for key in sorted({*ours, *theirs}):
            lines += differences(ours.get(key), theirs.get(key), f"{prefix}{key}.")
        return lines
    plain_ours, plain_theirs = (list(x) if isinstance(x, tuple) else x for x in (ours, theirs))
    if plain_ours == plain_theirs:
        return []
    # A field of a stranger's record may have any name.
    name = spelling.printable(prefix[:-1])
    return [f"{name}: {plain_ours!r} here, {plain_theirs!r} there"]
