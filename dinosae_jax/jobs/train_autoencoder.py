"""What an autoencoder stage is made of: data, weights, state, the task, and its last pictures."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from orbax.checkpoint import CheckpointManager

from dinosae_jax.data import images
from dinosae_jax.eval import image_quality, pictures, robustness, sphere_picture
from dinosae_jax.flow import matching
from dinosae_jax.flow.convention import LatentConvention
from dinosae_jax.generator import halve
from dinosae_jax.jobs import parts
from dinosae_jax.models import autoencoder
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.train import gan, logging, loop, sae_step, sharding, step_flops
from dinosae_jax.train import state as state_lib

Tree = Any
SHOWN, COLUMNS = 10, 5  # reconstructions, pairs a row


def convention_of(config: ml_collections.ConfigDict) -> LatentConvention:
    """The latent convention of an autoencoder config; the decode radius is not measured yet."""
    width = config.model.vit.embed_dim
    return LatentConvention(
        tokens=(config.data.image_size // 16) ** 2,
        width=width,
        radius=float(np.sqrt(width)),
        pixels=config.model.pixel_range,
    )


def make_stage(config: ml_collections.ConfigDict) -> sae_step.Stage:
    """The static part of a stage."""
    dtype = jnp.dtype(config.dtype)
    losses = tuple(name for name, weight in config.losses.items() if weight > 0)
    return sae_step.Stage(
        modules=autoencoder.build(config.model.to_dict(), dtype),
        lpips=LPIPS(dtype=dtype) if "lpips" in losses else None,
        critics=gan.build(config.model.dino, dtype) if "gan" in losses else None,
        trainable=tuple(config.trainable),
        losses=losses,
        noisy=max(config.latent_noise.tau, config.latent_noise.tau_end) > 0,
        accumulation=config.accumulation,
    )


def prepare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> parts.Prepared:
    """Opens the data, finds the weights and builds the task.

    Raises:
      ValueError: for unreadable data, missing weights, or weights that do not fit.
    """
    train_source = images.open_source(config.data, "train")
    eval_source = images.open_source(config.data, "eval")
    stage = make_stage(config)
    variables, notes = initial_variables(config, stage)
    frozen_files = parts.store(workdir, variables, (*stage.trainable, "disc_heads"))
    record = {
        "config": json.loads(json.dumps(config.to_dict())),
        "convention": convention_of(config).to_dict(),
        "frozen": frozen_files,
        "data": train_source.fingerprint,
        "notes": notes,
    }
    frozen = {role: variables[role] for role in frozen_files}
    frozen = sharding.replicate(halve(frozen) if config.dtype == "bfloat16" else frozen, mesh)
    trained = {role: variables[role] for role in variables if role not in frozen_files}

    def restore(manager: CheckpointManager) -> state_lib.TrainState:
        create = functools.partial(sae_step.create_state, stage, seed=config.seed)
        state, saved = parts.restore(manager, create, trained, mesh)
        if saved:
            logging.report(f"{config.name}: goes on from step {int(state.step)}")
            parts.check_data(saved, record, config)
            parts.check_frozen(saved, record)
        return state

    evaluate = _Evaluation(config, stage, frozen, eval_source, mesh)
    values = sae_step.numbers(config)
    compiled = sae_step.compile_step(stage, mesh)
    task = loop.Task(
        step=lambda state, batch: compiled(state, frozen, batch, values),
        evaluate=evaluate.figures,
        metric_names=stage.metric_names,
        flops_per_image=step_flops.train_flops(config),
    )
    batches = functools.partial(
        parts.training_batches, train_source, config, mesh, ("image",), config.batch_size
    )

    def finish(state: state_lib.TrainState) -> None:
        evaluate.write_pictures(state, workdir)
        evaluate.write_robustness(state, workdir)
        evaluate.write_sphere(state, workdir)

    return parts.Prepared(task, record, batches, restore, finish)


def initial_variables(
    config: ml_collections.ConfigDict, stage: sae_step.Stage
) -> tuple[sae_step.Variables, list[str]]:
    """Every role at step 0, and the notes that go with the weights.

    Raises:
      ValueError: for missing weights, or weights that do not fit.
    """
    draw = functools.partial(_draw, stage, image_size=config.data.image_size)
    trained = (*stage.trainable, "disc_heads")
    variables, notes = parts.find_variables(config, draw, trained, convention_of(config))
    if stage.aligns and not sae_step.has_teacher(variables):
        raise ValueError(
            "alignment needs the teacher, DINOv3 behind its own patch convolution; "
            f"{config.init_from} holds none (the official DINO-SAE file leaves it out); set "
            "losses.cosine and losses.mse to 0, or start from a converted DINOv3"
        )
    return variables, notes


def _draw(stage: sae_step.Stage, key: jax.Array, image_size: int) -> sae_step.Variables:
    """Random variables of every role of the stage."""
    variables = autoencoder.init(stage.modules, key, image_size)
    if stage.lpips:
        images = jnp.zeros((1, 64, 64, 3))
        drawn = stage.lpips.init(jax.random.fold_in(key, 1), images, images)
        variables["lpips"] = dict(drawn)
    if stage.critics:
        variables |= gan.init(stage.critics, jax.random.fold_in(key, 2))
    return variables


class _Evaluation:
    """Noise-free reconstructions of the evaluation images by the moving averages."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        stage: sae_step.Stage,
        frozen: sae_step.Variables,
        source: images.ImageSource,
        mesh: jax.sharding.Mesh,
    ):
        self.config, self.frozen, self.source, self.mesh = config, frozen, source, mesh
        self.modules = stage.modules
        self.reconstruct = _compiled_reconstruct(stage.modules)

    def _variables(self, state: state_lib.TrainState) -> sae_step.Variables:
        """The autoencoder's roles: of one form in every stage, so that stages share programs."""
        variables = {**self.frozen, **sae_step.merge(state.ema, state.extra)}
        return {role: variables[role] for role in ("stem", "vit", "decoder")}

    def _run(self, state: state_lib.TrainState, batch: dict[str, np.ndarray]) -> Any:
        """The whole global batch (image, label, mask) and its reconstructions, on every host."""
        placed = sharding.put_batch(batch, self.mesh)
        result = self.reconstruct(self._variables(state), placed["image"])
        return {name: sharding.gather(value) for name, value in {**placed, **result}.items()}

    def figures(self, state: state_lib.TrainState) -> dict[str, float]:
        """Means over the evaluation images, summed in float64 in their order."""
        sums: dict[str, float] = {}
        count = 0.0
        for batch in parts.evaluation_batches(self.source, self.config, self.mesh):
            result = self._run(state, batch)
            mask = result["mask"]
            count += float(mask.sum())
            for name in filter(result.__contains__, sae_step.FIGURES):
                each = np.asarray(result[name], np.float64)
                sums[name] = sums.get(name, 0.0) + float((each * mask).sum())
        return {f"eval/{name}": value / count for name, value in sums.items()}

    def write_pictures(self, state: state_lib.TrainState, workdir: pathlib.Path) -> None:
        """reconstructions.png (one image a class, up to ten) and baselines.json."""
        originals, reconstructions, labels = [], [], []
        baselines: dict[str, list[np.ndarray]] = {"block_means": [], "mean_colour": []}
        for batch in parts.evaluation_batches(self.source, self.config, self.mesh):
            result = self._run(state, batch)
            keep = result["mask"]
            image = result["image"][keep].astype(np.float32) / 255.0
            originals.append(image)
            reconstructions.append(result["reconstruction"][keep])
            labels.append(result["label"][keep])
            for name, figures in baselines.items():
                plain = getattr(image_quality, name)(jnp.asarray(image))
                figures.append(np.asarray(image_quality.psnr(plain, jnp.asarray(image))))
        if jax.process_index() != 0:
            return
        first = np.unique(np.concatenate(labels), return_index=True)[1][:SHOWN]
        above, below = (
            pictures.enlarged(np.concatenate(x)[first]) for x in (originals, reconstructions)
        )
        picture = pictures.pairs(above, below, COLUMNS)
        pictures.write_png(workdir / "reconstructions.png", picture)
        logging.write_json(
            workdir / "baselines.json",
            {f"{n}_psnr": float(np.mean(np.concatenate(v))) for n, v in baselines.items()},
        )

    def write_robustness(self, state: state_lib.TrainState, workdir: pathlib.Path) -> None:
        """robustness.json of the first evaluation batch."""
        batch = next(parts.evaluation_batches(self.source, self.config, self.mesh))
        placed = sharding.put_batch({name: batch[name] for name in ("image", "mask")}, self.mesh)
        keep = sharding.gather(placed["mask"])
        turned = _compiled_turned(self.modules)

        def measure(degrees: float) -> np.ndarray:
            each = turned(self._variables(state), placed["image"], jnp.float32(degrees))
            return sharding.gather(each)[keep]

        rows = robustness.curve(measure)
        if jax.process_index() == 0:
            logging.write_json(workdir / "robustness.json", rows)

    def write_sphere(self, state: state_lib.TrainState, workdir: pathlib.Path) -> None:
        """sphere.png of the first evaluation image and the first of another class (or the last)."""
        batch = next(parts.evaluation_batches(self.source, self.config, self.mesh))
        placed = sharding.put_batch({n: batch[n] for n in ("image", "label", "mask")}, self.mesh)
        variables = self._variables(state)
        tokens = sharding.gather(_compiled_encode(self.modules)(variables, placed["image"]))
        labels, keep = sharding.gather(placed["label"]), sharding.gather(placed["mask"])
        others = np.flatnonzero(keep & (labels != labels[0]))
        other = others[0] if len(others) else np.flatnonzero(keep)[-1]
        decode = functools.partial(_compiled_decode(self.modules), variables)
        picture = sphere_picture.draw(
            lambda z: sharding.gather(decode(np.asarray(z))),
            jnp.asarray(tokens[0]),
            jnp.asarray(tokens[other]),
            jax.random.PRNGKey(0),
        )
        if jax.process_index() == 0:
            pictures.write_png(workdir / "sphere.png", picture)


@functools.lru_cache
def _compiled_turned(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    @jax.jit
    def turned(variables: sae_step.Variables, batch: jax.Array, degrees: jax.Array) -> jax.Array:
        image = batch.astype(jnp.float32) / 255.0
        code = autoencoder.encode(modules, variables, image)
        keys = matching.example_keys(jax.random.PRNGKey(0), jnp.arange(len(image)))
        decode = functools.partial(autoencoder.decode, modules, variables, grid=code.grid)
        return robustness.turned_psnr(decode, keys, code.tokens, image, degrees)

    return turned


@functools.lru_cache
def _compiled_reconstruct(modules: autoencoder.AutoencoderModules) -> Callable[..., Any]:
    @jax.jit
    def reconstruct(variables: sae_step.Variables, batch: jax.Array) -> Any:
        return sae_step.reconstruct(modules, variables, batch.astype(jnp.float32) / 255.0)

    return reconstruct


@functools.lru_cache
def _compiled_encode(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    @jax.jit
    def encode(variables: sae_step.Variables, batch: jax.Array) -> jax.Array:
        return autoencoder.encode(modules, variables, batch.astype(jnp.float32) / 255.0).tokens

    return encode


@functools.lru_cache
def _compiled_decode(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    @jax.jit
    def decode(variables: sae_step.Variables, tokens: jax.Array) -> jax.Array:
        side = math.isqrt(tokens.shape[1])
        return autoencoder.decode(modules, variables, tokens, (side, side))

    return decode
