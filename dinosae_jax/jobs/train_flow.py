"""What training a flow is made of: a frozen autoencoder, its token norms, the task, samples."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from orbax.checkpoint import CheckpointManager

from dinosae_jax.data import images, latents
from dinosae_jax.eval import pictures
from dinosae_jax.flow import schedule
from dinosae_jax.flow.convention import LatentConvention
from dinosae_jax.generator import Generator, halve
from dinosae_jax.jobs import flow_figures, parts
from dinosae_jax.models import autoencoder
from dinosae_jax.train import logging, loop, rfm_step, roles, sharding, step_flops
from dinosae_jax.train import state as state_lib

Tree = Any
MEASURED_IMAGES = 10_000
SHOWN_CLASSES, SHOWN_EACH = 10, 4
NORMS_FILE = "latents.json"


def make_stage(config: ml_collections.ConfigDict) -> rfm_step.Stage:
    """The static part of a flow's training."""
    dtype = jnp.dtype(config.dtype)
    convention = convention_of(config)
    times = config.flow.time.to_dict()
    times["shift"] = times["shift"] or schedule.dimension_shift(convention.tokens, convention.width)
    return rfm_step.Stage(
        modules=autoencoder.build(config.model.to_dict(), dtype),
        dit=rfm_step.build(config.model.dit.to_dict(), dtype),
        path=config.flow.path,
        radius=convention.radius,
        times=rfm_step.Times(**times),
        jacobi=config.flow.jacobi,
        accumulation=config.accumulation,
    )


def convention_of(
    config: ml_collections.ConfigDict, decode_radius: float | None = None
) -> LatentConvention:
    """The latent convention of a flow config."""
    width = config.model.vit.embed_dim
    return LatentConvention(
        tokens=(config.data.image_size // 16) ** 2,
        width=width,
        radius=config.flow.radius or float(np.sqrt(width)),
        decode_radius=decode_radius or config.flow.decode_radius or None,
        pixels=config.model.pixel_range,
    )


def flow_record(
    config: ml_collections.ConfigDict, stage: rfm_step.Stage, label_names: list[str]
) -> dict[str, Any]:
    """What sampling needs to know beside networks and convention; saved with every checkpoint."""
    sampling = config.sampling.to_dict()
    return {
        "path": stage.path,
        "shift": stage.times.shift,
        "sampling": {**sampling, "interval": list(sampling["interval"])},
        "label_names": label_names,
    }


def prepare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> parts.Prepared:
    """Opens images or cached latents, finds the autoencoder and its token norms, builds the task.

    Raises:
      ValueError: for unreadable data, another number of classes, missing weights, or weights,
        conventions or a latent cache that do not fit.
    """
    train_source, eval_source = (open_source(config, split) for split in ("train", "eval"))
    check_classes(config, train_source)
    stage = make_stage(config)
    variables, notes = initial_variables(config, stage)
    check_encoder((train_source, eval_source), variables)
    frozen_files = parts.store(workdir, variables, ("dit",))
    # Latents of a cache need no encoder on the devices, but for the KID of samples.
    needed = ("stem", "vit") if config.eval.samples or not config.data.latents else ()
    frozen = {role: variables[role] for role in needed}
    frozen = sharding.replicate(halve(frozen) if config.dtype == "bfloat16" else frozen, mesh)
    norms = token_norms(config, stage, frozen, train_source, workdir, mesh)
    logging.report(
        f"{config.name}: tokens have norm {norms['mean']:.4g} (deviation {norms['deviation']:.2g})"
    )
    convention = convention_of(config, config.flow.decode_radius or norms["mean"])
    flow = flow_record(config, stage, list(train_source.label_names))
    record = {
        "config": json.loads(json.dumps(config.to_dict())),
        "convention": convention.to_dict(),
        "flow": flow,
        "frozen": frozen_files,
        "data": train_source.fingerprint,
        "notes": notes,
    }

    def restore(manager: CheckpointManager) -> state_lib.TrainState:
        create = functools.partial(rfm_step.create_state, stage, seed=config.seed)
        trained = {"dit": variables["dit"]}
        state, saved = parts.restore(manager, create, trained, mesh)
        if saved:
            logging.report(f"{config.name}: goes on from step {int(state.step)}")
            parts.check_data(saved, record, config)
            parts.check_frozen(saved, record)
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
        distance = flow_figures.SampleDistance(config, stage, frozen, train_source, mesh)

    def evaluate(state: state_lib.TrainState) -> dict[str, float]:
        found = flow_figures.held_out_losses(config, stage, frozen, eval_source, mesh, state)
        return found | (distance(generator_of(state)) if distance else {})

    values = rfm_step.numbers(config)
    compiled = rfm_step.compile_step(stage, mesh)
    task = loop.Task(
        step=lambda state, batch: compiled(state, frozen, batch, values),
        evaluate=evaluate,
        metric_names=rfm_step.METRICS,
        flops_per_image=step_flops.train_flops(config),
    )
    batches = functools.partial(
        parts.training_batches,
        train_source,
        config,
        mesh,
        parts.fields_of(train_source),
        config.batch_size,
    )

    def finish(state: state_lib.TrainState) -> None:
        generator = generator_of(state)
        write_samples(generator, config.seed, config.eval.batch_size, workdir / "samples.png")

    return parts.Prepared(task, record, batches, restore, finish)


def initial_variables(
    config: ml_collections.ConfigDict, stage: rfm_step.Stage
) -> tuple[parts.Variables, list[str]]:
    """Roles stem, vit, decoder and dit at step 0, and the notes that go with the weights."""

    def draw(key: jax.Array) -> parts.Variables:
        variables = autoencoder.init(stage.modules, key, config.data.image_size)
        return {**variables, "dit": rfm_step.init(stage.dit, jax.random.fold_in(key, 3))}

    return parts.find_variables(config, draw, ("dit",), convention_of(config))


def open_source(config: ml_collections.ConfigDict, split: str) -> parts.Source:
    """The images of a split, or their latents where `data.latents` names a cache of them.

    Raises:
      ValueError: for unreadable data, or a cache of other images or of other latents.
    """
    if not config.data.latents:
        return images.open_source(config.data, split)
    source = latents.open_source(config.data, split)
    convention = convention_of(config)
    for name in ("tokens", "width", "norm"):
        ours, theirs = getattr(convention, name), source.manifest[name]
        if ours != theirs:
            raise ValueError(
                f"a latent cache must hold this encoder's latents; {config.data.latents} was made "
                f"with {name} {theirs!r}, this config's encoder has {ours!r}; encode again with "
                "configs/encode.py"
            )
    return source


def check_encoder(sources: Sequence[parts.Source], variables: parts.Variables) -> None:
    """Raises ValueError where a latent cache was made by other weights than stem and vit here."""
    caches = [source for source in sources if isinstance(source, latents.LatentSource)]
    if not caches:
        return
    ours = {role: roles.sha256(variables[role]) for role in latents.ENCODER_ROLES}
    for cache in caches:
        changed = [role for role, found in ours.items() if cache.manifest["encoder"][role] != found]
        if changed:
            raise ValueError(
                f"a latent cache must be made by the encoder of init_from; {cache.folder} was made "
                f"by another {' and '.join(changed)}; name the autoencoder that made it, or encode "
                "again with configs/encode.py"
            )


def check_classes(config: ml_collections.ConfigDict, source: parts.Source) -> None:
    """Raises ValueError where the data have another number of classes than the model."""
    if source.num_classes != config.model.dit.num_classes:
        raise ValueError(
            f"model.dit.num_classes must be the number of classes of the data; got "
            f"{config.model.dit.num_classes} and {source.num_classes} in {config.data.source}; "
            f"pass --config.model.dit.num_classes={source.num_classes}"
        )


def check_convention(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint was trained under another latent convention."""
    ours, theirs = (LatentConvention.from_dict(x["convention"]) for x in (record, saved))
    ours.check_equal(theirs, here="this config", there="checkpoint")


def token_norms(
    config: ml_collections.ConfigDict,
    stage: rfm_step.Stage,
    frozen: rfm_step.Variables,
    source: parts.Source,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Mean and standard deviation of the norms of the latent tokens, measured once per workdir.

    Training crops of up to `MEASURED_IMAGES` images in the order of training; small sets are seen
    about once. A latent cache knows those of all its tokens.

    Returns:
      mean, deviation, and images or tokens; what was measured stands in `workdir/latents.json`.
    """
    path = workdir / NORMS_FILE
    if isinstance(source, latents.LatentSource):
        return source.manifest["norms"]
    if path.exists():
        return json.loads(path.read_text())

    @jax.jit
    def moments(frozen: Tree, image: jax.Array) -> jax.Array:
        scaled = image.astype(jnp.float32) / 255.0
        norms = jnp.linalg.norm(autoencoder.encode(stage.modules, frozen, scaled).tokens, axis=-1)
        return jnp.stack([jnp.mean(norms, axis=-1), jnp.mean(norms**2, axis=-1)], axis=-1)

    size = parts.device_multiple(config.eval.batch_size, mesh)
    count = -(-min(MEASURED_IMAGES, len(source)) // size)
    batches = parts.training_batches(source, config, mesh, ("image",), size)
    found = [
        sharding.gather(moments(frozen, sharding.put_batch(batch, mesh)["image"]))
        for batch, _ in zip(batches, range(count), strict=False)
    ]
    mean, square = np.concatenate(found).astype(np.float64).mean(axis=0)
    deviation = float(np.sqrt(max(square - mean**2, 0.0)))
    norms = {"mean": float(mean), "deviation": deviation, "images": count * size}
    if jax.process_index() == 0:
        logging.write_json(path, norms)
    return norms


def write_samples(generator: Generator, seed: int, batch_size: int, path: pathlib.Path) -> None:
    """A class grid: up to `SHOWN_CLASSES` classes, `SHOWN_EACH` samples of each."""
    count = min(generator.num_classes, SHOWN_CLASSES)
    classes = np.linspace(0, generator.num_classes - 1, count).round().astype(np.int32)
    labels = np.repeat(classes, SHOWN_EACH)
    images = generator.sample(labels, key=jax.random.PRNGKey(seed), batch_size=batch_size)
    if jax.process_index() == 0:
        shown = pictures.enlarged(images)
        rows = shown.reshape(count, SHOWN_EACH, *shown.shape[1:])
        names = [generator.label_names[label] for label in classes]
        pictures.write_png(path, pictures.class_grid(rows, names))
