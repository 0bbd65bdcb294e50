"""Every rule between the fields of a config, each with its message.

`validate` runs before anything is compiled. A message is one line: the rule, the value received,
the way out.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import ml_collections

from dinosae_jax import names, spelling

LARGEST_SEED = 2**32 - 1
POSITIVE = (
    "steps",
    "batch_size",
    "accumulation",
    "log_every",
    "skip_limit",
    "mesh.fsdp",
    "optimizer.learning_rate",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.batch_size",
    "eval.images",
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every rule between the fields of a job's config, or of each stage of a chain.

    Raises:
      ValueError: with one line that states the rule, the value received and the way out.
    """
    _require_member("config.job", config.job, RULES)
    for field, value in leaves(config):
        _check_leaf(field, value)
    RULES[config.job](config)


def leaves(config: ml_collections.ConfigDict, seen: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a config that is no group."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{seen}{name}.")
        else:
            yield f"{seen}{name}", value


def require_local(field: str, value: str) -> None:
    """Refuses a URL where only a path of this machine is read.

    Raises:
      ValueError: with the field, the URL and what works.
    """
    if _scheme(value):
        raise ValueError(
            f"{field} is a path on this machine; got {value!r}, a URL, which is not read; mount "
            "the bucket (gcsfuse, mountpoint-s3, rclone mount) or copy it, and name that folder"
        )


def check_url(field: str, value: str) -> None:
    """Refuses a URL that is no bucket: 'https://...', or 'folder:https://...' for images.

    Raises:
      ValueError: with the field, the URL and what works, or the package that is missing.
    """
    scheme = _scheme(value)
    if not scheme:
        return
    known = ", ".join(f"{name}://" for name in names.SCHEMES)
    if scheme not in names.SCHEMES:
        raise ValueError(
            f"{field} is a path on this machine or one that begins with {known}; got {value!r}; "
            "copy it to one of these, or mount it and name that folder"
        )
    if importlib.util.find_spec(names.SCHEMES[scheme]) is None:
        raise ValueError(
            f"{field} in a bucket needs the package {names.SCHEMES[scheme]}; got {value!r} without "
            "it; run pip install 'dinosae-jax[cloud]'"
        )


def _scheme(value: str) -> str:
    """The scheme of a URL, also behind the kind of a source; '' for a path."""
    found = re.match(r"(?:[a-z_]+:)?([A-Za-z][A-Za-z0-9+.-]*)://", value)
    return found[1].lower() if found else ""


def _check_leaf(field: str, value: Any) -> None:
    """The rules for every value: finite numbers, seeds in range, no URLs but of buckets."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} must be a finite number; got {value}; set --config.{field}=...")
    if isinstance(value, str):
        check_url(field, value)
    if field.rpartition(".")[2] in ("seed", "seeds"):
        for seed in value if isinstance(value, tuple | list) else (value,):
            if not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
                raise ValueError(
                    f"{field} must be a whole number from 0 to 2^32-1; got {seed}; "
                    f"set --config.{field}=..."
                )


def _validate_training(config: ml_collections.ConfigDict) -> None:
    if "chain" in config:
        _validate_chain(config)
        return
    _validate_run(config)
    if "flow" in config:
        _validate_flow(config)
    else:
        _validate_autoencoder(config)


def _validate_chain(config: ml_collections.ConfigDict) -> None:
    for name in config.chain:
        if name not in config.stages:
            raise ValueError(
                f"chain must name stages of config.stages; got {name!r}"
                f"{spelling.nearest(name, config.stages)}"
            )
        try:
            validate(config.stages[name])
        except ValueError as error:
            raise in_stage(name, error) from error


def _validate_plan(config: ml_collections.ConfigDict) -> None:
    _validate_chain(config)
    _require_member("effort", config.effort, get_args(names.Effort))
    if config.top < 0:
        raise ValueError(f"top counts instructions; got {config.top}; 0 lists none")


def _validate_ablation(config: ml_collections.ConfigDict) -> None:
    for arm in (*config.order, *config.get("once", ())):
        if arm not in config.arms:
            raise ValueError(
                f"order must name arms; got {arm!r}{spelling.nearest(arm, config.arms)}"
            )
    validate(config.base)  # each arm is checked when its changes are applied
    fewest = min(config.get("samples", config.images), config.images)
    if not 2 <= config.kernel_subset_size <= fewest:
        raise ValueError(
            "kernel_subset_size must lie between 2 and the fewer of samples and images, "
            f"{fewest}; got {config.kernel_subset_size}; pass --config.kernel_subset_size={fewest}"
        )
    if "sweep" in config:
        _validate_sweep(config)


def _validate_sweep(config: ml_collections.ConfigDict) -> None:
    """Checks what a comparison of flows samples when all of them are trained."""
    sweep = config.sweep
    _require_member("sweep.arm", sweep.arm, config.order)
    for sampler in sweep.samplers:
        validate_sampling({"sampler": sampler})
    for steps in sweep.steps:
        validate_sampling({"steps": steps})
    for radius in sweep.radii:
        validate_sampling({"decode_radius": radius})
    for scale in config.guidances:
        validate_sampling({"guidance": scale})


def in_stage(name: str, error: ValueError) -> ValueError:
    """The message of an error in one stage of a chain: says which, its flags are the chain's."""
    text = str(error).replace("--config.", f"--config.stages.{name}.")
    return ValueError(f"stages.{name}: {text}")


def _validate_bench(config: ml_collections.ConfigDict) -> None:
    _validate_chain(config)
    for field in ("repeats", "steps", *(f"batch_per_device.{name}" for name in config.chain)):
        _require_positive(config, field)
    if config.warmup < 0:
        raise ValueError(f"warmup must not be negative; got {config.warmup}; 0 is none")


def _validate_card(config: ml_collections.ConfigDict) -> None:
    _validate_bench(config)
    for name in config.card.rows:
        _require_member("card.rows", name, names.CARD_ROWS)
    for field in ("card.seconds", "card.row_seconds"):
        _require_positive(config, field)


def _validate_run(config: ml_collections.ConfigDict) -> None:
    for field in POSITIVE:
        _require_positive(config, field)
    optimizer = config.optimizer
    for field in ("weight_decay", "clip_norm", "warmup_steps", "decay_start"):
        if optimizer[field] < 0:
            raise ValueError(
                f"optimizer.{field} must not be negative; got {optimizer[field]}; 0 turns it off"
            )
    _require_member("optimizer.schedule", optimizer.schedule, get_args(names.Schedule))
    if optimizer.schedule != "constant" and optimizer.decay_start >= config.steps:
        raise ValueError(
            f"optimizer.decay_start must lie before the last step; got {optimizer.decay_start} of "
            f"steps={config.steps}; lower it or use optimizer.schedule='constant'"
        )
    _require_member("dtype", config.dtype, get_args(names.Dtype))
    for part, value in config.matmul_precision.items():
        _require_member(f"matmul_precision.{part}", value, get_args(names.MatmulPrecision))
    milestones = config.checkpoint.milestones
    if milestones < 0 or milestones % config.checkpoint.every:
        raise ValueError(
            "checkpoint.milestones must be a multiple of checkpoint.every, or 0 for none; got "
            f"{milestones} and {config.checkpoint.every}; change one of them"
        )
    _require_member("on_mismatch", config.on_mismatch, get_args(names.OnMismatch))
    if not 0.0 <= config.ema < 1.0:
        raise ValueError(f"ema must lie in [0, 1); got {config.ema}; the paper's is near 0.9978")
    if config.profile_steps:
        profile_range(config.profile_steps)
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"batch_size must be a multiple of accumulation; got {config.batch_size} and "
            f"{config.accumulation}; change one of them"
        )


def profile_range(text: str) -> tuple[int, int]:
    """The first step of a trace and the one after its last, from `profile_steps`.

    Raises:
      ValueError: where the text is not FIRST:END with 1 <= FIRST < END.
    """
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise ValueError(
            f"profile_steps is FIRST:END with 1 <= FIRST < END; got {text!r}; '10:13' traces the "
            "steps 10, 11 and 12, '' none"
        )
    return int(first), int(end)


def _validate_autoencoder(config: ml_collections.ConfigDict) -> None:
    for name, weight in config.losses.items():
        _require_member("losses", name, get_args(names.Loss))
        if weight < 0:
            raise ValueError(f"losses.{name} must not be negative; got {weight}; 0 turns it off")
    for role in config.trainable:
        _require_member("trainable", role, ("stem", "decoder"))
    if "decoder" not in config.trainable:
        raise ValueError(
            "an autoencoder stage trains the decoder (every pixel loss reaches it); got "
            f"trainable={tuple(config.trainable)}; add 'decoder'"
        )
    if not any(config.losses[name] for name in ("l1", "lpips")):
        raise ValueError(
            "a stage needs a reconstruction loss; got losses.l1=0 and losses.lpips=0; "
            "set one of them above 0"
        )
    for name in ("cosine", "mse"):
        if config.losses[name] and "stem" not in config.trainable:
            raise ValueError(
                f"losses.{name} needs 'stem' in trainable (a frozen encoder gets no gradient from "
                f"it); got trainable={tuple(config.trainable)}; set losses.{name}=0"
            )
    own_patches = config.model.stem.get("kind") == "patch"  # the encoder's, which weights.vit has
    if "stem" not in config.trainable and not config.init_from and not own_patches:
        raise ValueError(
            "a stage with a frozen stem continues another one; got an empty init_from; name the "
            "workdir, checkpoint or export that holds the trained stem"
        )
    noise = config.latent_noise
    if min(noise.tau, noise.tau_end, noise.ramp_steps) < 0:
        raise ValueError(f"latent_noise values must not be negative; got {noise.to_dict()}")
    if (noise.tau_end > 0) != (noise.ramp_steps > 0):
        raise ValueError(
            "latent_noise moves from tau to tau_end over ramp_steps, so one needs the other; got "
            f"tau_end={noise.tau_end} and ramp_steps={noise.ramp_steps}; set both or neither"
        )
    if max(noise.tau, noise.tau_end) > 0 and "stem" in config.trainable:
        raise ValueError(
            "latent noise belongs to stages with a frozen encoder (the paper's fourth); got "
            f"tau={noise.tau}, tau_end={noise.tau_end} with trainable={tuple(config.trainable)}; "
            "freeze the stem or set both to 0"
        )
    if min(config.gan.start, config.gan.disc_start) < 0:
        raise ValueError(f"gan.start and gan.disc_start count steps; got {config.gan.to_dict()}")
    if config.losses.gan > 0 and config.gan.disc_start > config.gan.start:
        raise ValueError(
            "the discriminator trains before the generator listens to it; got gan.disc_start="
            f"{config.gan.disc_start} after gan.start={config.gan.start}; lower disc_start"
        )
    for role in config.random_frozen_ok:
        _require_member("random_frozen_ok", role, ("vit", "lpips", "dino"))
    _validate_data(config.data)
    _validate_model(config)


def _validate_model(config: ml_collections.ConfigDict) -> None:
    """The rules of encoder and decoder: known names, blocks that exist, one grid."""
    model = config.model
    vit, decoder = model.vit, model.decoder
    _require_member("model.encoder", model.get("encoder", "dinov3"), get_args(names.Encoder))
    _require_member("model.vit.positions", vit.get("positions", "rope"), get_args(names.Positions))
    layers = tuple(vit.get("layers", ()))
    if list(layers) != sorted(set(layers)) or any(not 0 <= i < vit.depth for i in layers):
        raise ValueError(
            "model.vit.layers are increasing block numbers, counted from 0; got "
            f"{layers} of {vit.depth} blocks; () reads the last"
        )
    if (vit.get("positions", "rope") == "rope") != (vit.get("table_side", 0) == 0):
        raise ValueError(
            "model.vit.table_side is the side of a stored table of positions, which rotary ones "
            f"lack; got table_side={vit.get('table_side', 0)} with "
            f"positions={vit.get('positions', 'rope')!r}; take the variant of a published encoder"
        )
    _require_member("model.decoder.kind", decoder.get("kind", "conv"), get_args(names.DecoderKind))
    side = config.data.image_size // names.PATCH_SIZE
    if decoder.get("kind") == "vit" and (decoder.grid, decoder.patch_size) != (side, 16):
        raise ValueError(
            f"a ViT decoder has the grid of its images, {side} tokens of 16 pixels a side for "
            f"data.image_size={config.data.image_size}; got grid={decoder.grid} and "
            f"patch_size={decoder.patch_size}; set --config.model.decoder.grid={side}"
        )
    if not decoder.get("statistics"):
        return
    unknown = decoder.statistics != "variance" and not config.init_from  # which brings its own
    if "flow" not in config and (unknown or "stem" in config.trainable):
        raise ValueError(
            "a decoder's statistics of latents are measured at the start of its training, as "
            "'variance', around a frozen stem; got "
            f"statistics={decoder.statistics!r} and trainable={tuple(config.trainable)}; train "
            "the decoder alone, or leave them out with --config.model.decoder.statistics=''"
        )
    if decoder.statistics_side not in (1, side):
        raise ValueError(
            f"statistics of latents have the grid of the images, {side} a side, or one value per "
            f"channel; got statistics_side={decoder.statistics_side}; set "
            f"--config.model.decoder.statistics_side={side}"
        )


def _validate_flow(config: ml_collections.ConfigDict) -> None:
    flow, dit = config.flow, config.model.dit
    if tuple(config.trainable) != ("dit",):
        raise ValueError(
            "a flow trains the diffusion transformer and nothing else; got "
            f"trainable={tuple(config.trainable)}; set trainable=('dit',)"
        )
    for role in config.random_frozen_ok:
        _require_member("random_frozen_ok", role, ("stem", "vit", "decoder"))
    _require_member("flow.path", flow.path, get_args(names.FlowPath))
    _require_member(
        "flow.time.distribution", flow.time.distribution, get_args(names.TimeDistribution)
    )
    _require_member("flow.jacobi", flow.jacobi, get_args(names.Jacobi))
    for name in ("jacobi", "radial_weight"):
        if flow[name] and flow.path != "geodesic":
            raise ValueError(
                f"flow.{name} weighs errors on the sphere; got {flow[name]!r} with "
                f"flow.path={flow.path!r}; leave it out, or take flow.path='geodesic'"
            )
    for name in ("radius", "decode_radius", "radial_weight", "time.shift"):
        value = flow.time.shift if name == "time.shift" else flow[name]
        if value < 0:
            raise ValueError(f"flow.{name} must not be negative; got {value}; 0 is the default")
    for field in ("flow.time.sigma", "model.dit.num_classes"):
        _require_positive(config, field)
    if config.eval.samples < 0 or config.eval.samples == 1:
        raise ValueError(
            f"eval.samples must be at least 2 (KID averages over pairs), or 0 for no KID; got "
            f"{config.eval.samples}"
        )
    if not 0 < flow.time.max_time <= 1:
        raise ValueError(
            f"flow.time.max_time must lie in (0, 1]; got {flow.time.max_time}; 0.999 as in RAE"
        )
    _validate_model(config)
    _require_member("model.dit.model", dit.model, get_args(names.DitModel))
    if not 0 <= dit.class_dropout_prob < 1:
        raise ValueError(
            "model.dit.class_dropout_prob must lie in [0, 1); got "
            f"{dit.class_dropout_prob}; the usual value is 0.1"
        )
    _validate_data(config.data)
    if config.data.latents:
        _require_center_crop(config.data, "training on a latent cache")
    latents = {
        "input_size": config.data.image_size // 16,
        "in_channels": config.model.vit.embed_dim,
    }
    for name, wanted in latents.items():
        if dit[name] != wanted:
            raise ValueError(
                f"model.dit.{name} must be that of the encoder's latents, {wanted} (image_size/16 "
                f"tokens per side, vit.embed_dim channels); got {dit[name]}; change it"
            )
    validate_sampling(config.sampling, has_null_label=dit.class_dropout_prob > 0)


def _validate_sample(config: ml_collections.ConfigDict) -> None:
    for field in ("batch_per_device", "chunk"):
        _require_positive(config, field)
    _require_member("dtype", config.dtype, get_args(names.Dtype))
    if config.count < 0:
        raise ValueError(f"count must not be negative; got {config.count}; 0 is the natural number")
    if not config.init_from and "dit" not in config.random_frozen_ok:
        raise ValueError(
            "sampling needs a flow; got an empty init_from; name its workdir, checkpoint or export "
            "with --config.init_from=..., or use the variant :tiny, which draws a random one"
        )
    if config.weaker and not config.init_from:
        raise ValueError(
            f"a weaker flow guides the flow of init_from; got weaker={config.weaker!r} and no "
            "init_from; name both"
        )
    given = {name: value for name, value in config.sampling.items() if value is not None}
    validate_sampling(given)


def _validate_conversion(config: ml_collections.ConfigDict) -> None:
    for field in ("num_shards", "threads"):
        _require_positive(config, field)
    for split in config.splits:
        _require_member("splits", split, ("train", "eval"))
    for field in ("crop_size", "short_side"):
        if config[field] < 0:
            raise ValueError(
                f"{field} must not be negative; got {config[field]}; 0 keeps the files as they are"
            )
    if config.eval_synsets and "eval" not in config.splits:
        raise ValueError(
            "eval_synsets labels the split eval; got splits without it; add eval, or leave "
            "eval_synsets empty"
        )
    if not config.source:
        raise ValueError(
            "convert_images needs images; got an empty source; name them with "
            "--config.source=folder:PATH, tar:PATTERN or tfds:NAME"
        )


def _validate_measurement(config: ml_collections.ConfigDict) -> None:
    """The rules of every job that measures trained weights on images."""
    _require_positive(config, "batch_size")
    _require_member("dtype", config.dtype, get_args(names.Dtype))
    _validate_data(config.data)
    if not (config.init_from or config.get("samples") or config.random_frozen_ok):
        raise ValueError(
            f"{config.job} needs trained weights; got an empty init_from; name a workdir, "
            "checkpoint, export or conversion with --config.init_from=..., or use the variant "
            ":tiny, which draws random ones"
        )
    if "reference_moments" in config:
        _validate_moments(config.reference_moments)


def _validate_moments(moments: ml_collections.ConfigDict) -> None:
    """The rules of what is said of moments that do not say how they were made."""
    if not moments.resize and not moments.count:
        return
    _require_member("reference_moments.resize", moments.resize, get_args(names.InceptionResize))
    if moments.count < 2:
        raise ValueError(
            "reference_moments.count must be at least 2, the number of images that the moments are "
            f"of; got {moments.count}; set it with reference_moments.resize"
        )


def _validate_encode(config: ml_collections.ConfigDict) -> None:
    _validate_measurement(config)
    _require_center_crop(config.data, "encode")
    _require_member("format", config.format, get_args(names.LatentFormat))
    if config.num_shards < 0:
        raise ValueError(
            f"num_shards must not be negative; got {config.num_shards}; 0 makes shards of 1 GiB"
        )


def _validate_evaluation(config: ml_collections.ConfigDict) -> None:
    _validate_measurement(config)
    _require_member("uint8_conversion", config.uint8_conversion, get_args(names.Uint8Conversion))
    _require_member("resize", config.resize, get_args(names.InceptionResize))
    for field, least in (("images", 0), ("reference_images", 0), ("kernel_subset_size", 2)):
        if config[field] < least:
            raise ValueError(
                f"{field} must be at least {least}; got {config[field]}; the papers' protocol "
                "is the default of configs/evaluate.py"
            )


def validate_sampling(sampling: Mapping[str, Any], has_null_label: bool = True) -> None:
    """Checks the sampling fields that are given.

    Args:
      sampling: some of sampler, steps, guidance, interval, decode_radius.
      has_null_label: whether the model was trained with label dropout.

    Raises:
      ValueError: for a value out of range, or guidance that the model cannot do.
    """
    if "sampler" in sampling:
        _require_member("sampler", sampling["sampler"], get_args(names.Sampler))
    if sampling.get("steps", 1) < 1:
        raise ValueError(
            f"a sampler makes at least 1 step; got steps={sampling['steps']}; raise it"
        )
    low, high = sampling.get("interval", (0.0, 1.0))
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"a guidance interval is (lo, hi) with 0 <= lo <= hi <= 1; got {(low, high)}; "
            "(0, 1) guides everywhere"
        )
    if sampling.get("guidance", 1.0) != 1.0 and not has_null_label:
        raise ValueError(
            "guidance needs a model with a null label, trained with class_dropout_prob above 0; "
            f"got guidance={sampling['guidance']}; use guidance 1 or another model"
        )
    if not sampling.get("decode_radius", 1.0) > 0:
        raise ValueError(
            f"decode_radius must be above zero; got {sampling['decode_radius']}; "
            "leave it out for the flow's own"
        )


def _validate_data(data: ml_collections.ConfigDict) -> None:
    _require_member("data.crop", data.crop, get_args(names.Crop))
    patch = 16
    if data.image_size < patch or data.image_size % patch:
        raise ValueError(
            f"data.image_size must be a multiple of the patch size {patch}; got {data.image_size}"
        )


def _require_center_crop(data: ml_collections.ConfigDict, what: str) -> None:
    if data.crop != "center":
        raise ValueError(
            f"{what} needs data.crop='center', the one crop of an image that a cache can hold; got "
            f"{data.crop!r}; pass --config.data.crop=center"
        )


def _validate_reader(config: ml_collections.ConfigDict) -> None:
    roles = ("stem", "vit", "decoder")
    for role in config.random_frozen_ok:
        _require_member("random_frozen_ok", role, roles)
    if not config.init_from and set(roles) - set(config.random_frozen_ok):
        raise ValueError(
            f"{config.job} needs an autoencoder; got an empty init_from; name a stage's workdir, a "
            "checkpoint, an export or converted weights with --config.init_from=..., or use the "
            "variant :tiny, which draws a random one"
        )


def _validate_reconstruction(config: ml_collections.ConfigDict) -> None:
    _validate_reader(config)
    _require_member("dtype", config.dtype, get_args(names.Dtype))
    _require_positive(config, "batch_size")
    if not config.images:
        raise ValueError(
            "reconstruct needs images; got images=''; name a folder with --config.images=..."
        )
    if config.short_side and config.short_side < 16:
        raise ValueError(
            f"short_side is at least the patch size 16, or 0 to keep every size; got "
            f"{config.short_side}; raise it"
        )


def _require_positive(config: ml_collections.ConfigDict, field: str) -> None:
    value = config
    for part in field.split("."):
        value = value[part]
    if not value > 0:
        raise ValueError(f"{field} must be above zero; got {value}; set --config.{field}=...")


def _require_member(field: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{field} must be a known name; got {value!r}{spelling.nearest(str(value), allowed)}"
        )


RULES: dict[str, Callable[[ml_collections.ConfigDict], None]] = {  # of each file of jobs/
    "ablation": _validate_ablation,
    "bench": _validate_bench,
    "card": _validate_card,
    "convert_images": _validate_conversion,
    "encode": _validate_encode,
    "evaluate": _validate_evaluation,
    "export": _validate_reader,
    "paper": _validate_chain,
    "pca": _validate_measurement,
    "plan": _validate_plan,
    "probe": _validate_measurement,
    "reconstruct": _validate_reconstruction,
    "sample": _validate_sample,
    "train": _validate_training,
}
