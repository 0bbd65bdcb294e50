"""The task of an autoencoder stage: data, weights, state, step, evaluation, final images."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from orbax.checkpoint import CheckpointManager

from dinosae_jax.data import images, loading
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.models import autoencoder
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.runtime import console, precision, sharding
from dinosae_jax.train import (
    autoencoder_evaluation,
    autoencoder_step,
    discriminator_step,
    latent_norms,
    latent_statistics,
    preparation,
    step_flops,
)
from dinosae_jax.train import state as state_lib
from dinosae_jax.train.jit_step import jit_step
from dinosae_jax.train.task import Task

Tree = Any


def step_spec(config: ml_collections.ConfigDict) -> autoencoder_step.StepSpec:
    """The static part of a stage."""
    dtype = jnp.dtype(config.dtype)
    losses = tuple(name for name, weight in config.losses.items() if weight > 0)
    return autoencoder_step.StepSpec(
        modules=autoencoder.build(config.model.to_dict(), dtype),
        lpips=LPIPS(dtype=dtype) if "lpips" in losses else None,
        discriminator=discriminator_step.build(
            config.model.dino, dtype, precision.matmul_precision(config, "discriminator_heads")
        )
        if "gan" in losses
        else None,
        trainable=tuple(config.trainable),
        losses=losses,
        noisy=max(config.latent_noise.tau, config.latent_noise.tau_end) > 0,
        accumulation=config.accumulation,
        matmul_precision=precision.matmul_precision(config, "compute"),
    )


def prepare(
    config: ml_collections.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh
) -> Task:
    """Opens the data, finds the weights and builds the task.

    Raises:
      ValueError: for unreadable data, missing weights, or weights that do not fit.
    """
    train_source = images.open_images(config.data, "train")
    eval_source = images.open_images(config.data, "eval")
    spec = step_spec(config)
    variables, notes, source, weights = initial_variables(config, spec)
    frozen_files = preparation.store_frozen(workdir, variables, (*spec.trainable, "disc_heads"))
    record = {
        "config": json.loads(json.dumps(config.to_dict())),
        "convention": LatentConvention.of(config).to_dict(),
        "frozen": frozen_files,
        "data": train_source.fingerprint,
        "notes": notes,
        "source": source,
        "weights": weights,
    }
    preparation.agree_on_inputs(record, variables, (train_source, eval_source))
    frozen = {role: variables[role] for role in frozen_files}
    frozen = sharding.replicate(precision.frozen(frozen, config.dtype), mesh)
    if latent_statistics.are_missing(variables["decoder"]):
        variables["decoder"]["statistics"] = latent_statistics.measure(
            config, spec, frozen, train_source, workdir, mesh, latent_norms.identity(record)
        )
    trained = {role: variables[role] for role in variables if role not in frozen_files}

    def restore(manager: CheckpointManager) -> state_lib.TrainState:
        create = functools.partial(autoencoder_step.create_state, spec, seed=config.seed)
        state, saved = preparation.restore_or_create(config, manager, create, trained, mesh)
        if saved:
            console.report(f"{config.name}: resumes from step {int(state.step)}")
            preparation.check_data(saved, record, config)
            preparation.check_start(saved, record)
            preparation.check_frozen(saved, record)
        return state

    evaluation = autoencoder_evaluation.Evaluation(config, spec, frozen, eval_source, mesh)
    hyperparams = sharding.replicate(autoencoder_step.hyperparameters(config), mesh)
    compiled = jit_step(autoencoder_step.train_step, spec, mesh)
    batches = functools.partial(
        loading.training_batches, train_source, config, mesh, ("image",), config.batch_size
    )

    def finish(state: state_lib.TrainState) -> None:
        evaluation.write_pictures(state, workdir)
        evaluation.write_robustness(state, workdir)
        evaluation.write_sphere(state, workdir)

    return Task(
        step=lambda state, batch: compiled(state, frozen, batch, hyperparams),
        evaluate=evaluation.metrics,
        batches=batches,
        restore=restore,
        finish=finish,
        record=record,
        metric_names=spec.metric_names,
        flops_per_image=step_flops.train_flops(config),
    )


def initial_variables(
    config: ml_collections.ConfigDict, spec: autoencoder_step.StepSpec
) -> preparation.Found:
    """Every role at step 0, the notes that go with the weights, and where they come from.

    Raises:
      ValueError: for missing weights, or weights that do not fit.
    """
    draw = functools.partial(draw_variables, spec, image_size=config.data.image_size)
    trained = (*spec.trainable, "disc_heads")
    found = preparation.find_variables(config, draw, trained, LatentConvention.of(config))
    if spec.aligns and not autoencoder.has_teacher(found.variables):
        raise ValueError(
            "alignment needs the teacher, the encoder with its own patch convolution; got "
            f"{config.init_from} without it (the official DINO-SAE file leaves it out); set "
            "losses.cosine and losses.mse to 0, or start from a converted DINOv3"
        )
    return found


def draw_variables(
    spec: autoencoder_step.StepSpec, key: jax.Array, image_size: int
) -> autoencoder_step.Variables:
    """Random variables of every role of the stage."""
    variables = autoencoder.init(spec.modules, key, image_size)
    if spec.lpips:
        images = jnp.zeros((1, 64, 64, 3))
        drawn = spec.lpips.init(jax.random.fold_in(key, 1), images, images)
        variables["lpips"] = dict(drawn)
    if spec.discriminator:
        variables |= discriminator_step.init(spec.discriminator, jax.random.fold_in(key, 2))
    return variables
