"""The task of a flow: a frozen autoencoder, its token norms, data, state, step, samples."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from orbax.checkpoint import CheckpointManager

from dinosae_jax import names
from dinosae_jax.data import images, loading
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.flow import schedule
from dinosae_jax.inference.generator import Generator, flow_record
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.models import autoencoder, registry
from dinosae_jax.runtime import console, precision, sharding
from dinosae_jax.train import flow_evaluation, flow_step, latent_norms, preparation, step_flops
from dinosae_jax.train import state as state_lib
from dinosae_jax.train.jit_step import jit_step
from dinosae_jax.train.task import Task
from dinosae_jax.weights import role_files

Tree = Any


def step_spec(config: ml_collections.ConfigDict) -> flow_step.StepSpec:
    """The static part of a flow's training."""
    dtype = jnp.dtype(config.dtype)
    convention = LatentConvention.of(config)
    times = config.flow.time.to_dict()
    times["shift"] = schedule.default_shift(times["shift"], convention.tokens, convention.width)
    return flow_step.StepSpec(
        modules=autoencoder.build(config.model.to_dict(), dtype),
        dit=registry.build(
            "dit",
            config.model.dit.to_dict(),
            dtype=dtype,
            output_precision=precision.matmul_precision(config, "output_head"),
        ),
        path=config.flow.path,
        radius=convention.radius,
        times=flow_step.Times(**times),
        jacobi=config.flow.jacobi,
        accumulation=config.accumulation,
        matmul_precision=precision.matmul_precision(config, "compute"),
    )


def prepare(
    config: ml_collections.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh
) -> Task:
    """Opens images or cached latents, finds the autoencoder and its token norms, builds the task.

    Raises:
      ValueError: for unreadable data, another number of classes, missing weights, or weights,
        conventions or a latent cache that do not fit.
    """
    train_source, eval_source = (open_flow_data(config, split) for split in ("train", "eval"))
    check_classes(config, train_source)
    spec = step_spec(config)
    variables, notes, source, weights = initial_variables(config, spec)
    check_encoder((train_source, eval_source), variables)
    frozen_files = preparation.store_frozen(workdir, variables, ("dit",))
    flow = flow_record(config, train_source.label_names)
    record = {
        "config": json.loads(json.dumps(config.to_dict())),
        "flow": flow,
        "frozen": frozen_files,
        "data": train_source.fingerprint,
        "notes": notes,
        "source": source,
        "weights": weights,
    }
    preparation.agree_on_inputs(record, variables, (train_source, eval_source))
    # Latents of a cache need no encoder on the devices, but for the KID of samples.
    needed = ("stem", "vit") if config.eval.samples or not config.data.latents else ()
    frozen = {role: variables[role] for role in needed}
    if statistics := variables["decoder"].get("statistics"):
        frozen["decoder"] = {"statistics": statistics}
    frozen = sharding.replicate(precision.frozen(frozen, config.dtype), mesh)
    norms = latent_norms.token_norms(
        config, spec, frozen, train_source, workdir, mesh, latent_norms.identity(record)
    )
    console.report(
        f"{config.name}: tokens have norm {norms['mean']:.4g} (deviation {norms['deviation']:.2g})"
    )
    convention = LatentConvention.of(config, config.flow.decode_radius or norms["mean"])
    record["convention"] = convention.to_dict()

    def restore(manager: CheckpointManager) -> state_lib.TrainState:
        create = functools.partial(flow_step.create_state, spec, seed=config.seed)
        trained = {"dit": variables["dit"]}
        state, saved = preparation.restore_or_create(config, manager, create, trained, mesh)
        if saved:
            console.report(f"{config.name}: resumes from step {int(state.step)}")
            preparation.check_data(saved, record, config)
            preparation.check_start(saved, record)
            preparation.check_frozen(saved, record)
            check_convention(saved, record)
        return state

    def generator_of(state: state_lib.TrainState) -> Generator:
        decoder = sharding.replicate(variables["decoder"], mesh)  # while samples are drawn
        return Generator(
            config.model.to_dict(),
            {"dit": {"params": state.ema["dit"]}, "decoder": decoder},
            convention,
            flow,
            mesh,
            jnp.dtype(config.dtype),
        )

    distance = None
    if config.eval.samples:
        distance = flow_evaluation.SampleDistance(config, spec, frozen, train_source, mesh)

    def evaluate(state: state_lib.TrainState) -> dict[str, float]:
        found = flow_evaluation.held_out_losses(config, spec, frozen, eval_source, mesh, state)
        return found | (distance(generator_of(state)) if distance else {})

    hyperparams = sharding.replicate(flow_step.hyperparameters(config), mesh)
    compiled = jit_step(flow_step.train_step, spec, mesh)
    batches = functools.partial(
        loading.training_batches,
        train_source,
        config,
        mesh,
        loading.fields_of(train_source),
        config.batch_size,
    )

    def finish(state: state_lib.TrainState) -> None:
        generator = generator_of(state)
        flow_evaluation.write_samples(
            generator,
            config.seed,
            config.eval.batch_size,
            workdir / "samples.png",
            train_source.examples if isinstance(train_source, images.ImageSource) else None,
        )

    return Task(
        step=lambda state, batch: compiled(state, frozen, batch, hyperparams),
        evaluate=evaluate,
        batches=batches,
        restore=restore,
        finish=finish,
        record=record,
        metric_names=flow_step.METRICS,
        flops_per_image=step_flops.train_flops(config),
    )


def initial_variables(
    config: ml_collections.ConfigDict, spec: flow_step.StepSpec
) -> preparation.Found:
    """Roles stem, vit, decoder and dit at step 0, their notes, and where they come from."""

    def draw(key: jax.Array) -> preparation.Variables:
        variables = autoencoder.init(spec.modules, key, config.data.image_size)
        return {**variables, "dit": registry.init_dit(spec.dit, jax.random.fold_in(key, 3))}

    return preparation.find_variables(config, draw, ("dit",), LatentConvention.of(config))


def open_flow_data(config: ml_collections.ConfigDict, split: str) -> loading.Source:
    """The images of a split, or their latents where `data.latents` names a cache of them.

    Raises:
      ValueError: for unreadable data, or a cache of other images or of other latents.
    """
    if not config.data.latents:
        return images.open_images(config.data, split, labelled=True)
    source = latent_reader.open_latents(config.data, split)
    convention = LatentConvention.of(config)
    stated = {"encoder": source.manifest.get("encoder_reading", "")}
    stated |= {name: source.manifest[name] for name in ("tokens", "width", "norm")}
    for name, theirs in stated.items():
        ours = getattr(convention, name)
        if ours != theirs:
            raise ValueError(
                f"a latent cache must hold this encoder's latents, with {name} {ours!r}; got "
                f"{config.data.latents} with {name} {theirs!r}; encode again with "
                "configs/encode.py"
            )
    return source


def check_encoder(sources: Sequence[loading.Source], variables: preparation.Variables) -> None:
    """Raises ValueError where a latent cache was made by other weights than stem and vit here."""
    caches = [source for source in sources if isinstance(source, latent_reader.LatentSource)]
    if not caches:
        return
    ours = {role: role_files.sha256(variables[role]) for role in names.ENCODER_ROLES}
    for cache in caches:
        changed = [role for role, found in ours.items() if cache.manifest["encoder"][role] != found]
        if changed:
            raise ValueError(
                "a latent cache must be made by the encoder of init_from; got "
                f"{cache.folder}, made by another {' and '.join(changed)}; name the autoencoder "
                "that made it, or encode again with configs/encode.py"
            )


def check_classes(config: ml_collections.ConfigDict, source: loading.Source) -> None:
    """Raises ValueError where the data have another number of classes than the model."""
    if source.num_classes != config.model.dit.num_classes:
        raise ValueError(
            "model.dit.num_classes must be the number of classes of the data; got "
            f"{config.model.dit.num_classes} and {source.num_classes} in {config.data.source}; "
            f"pass --config.model.dit.num_classes={source.num_classes}"
        )


def check_convention(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint was trained under another latent convention."""
    ours, theirs = (LatentConvention.from_dict(x["convention"]) for x in (record, saved))
    ours.check_equal(theirs, here="this config", there="checkpoint")
