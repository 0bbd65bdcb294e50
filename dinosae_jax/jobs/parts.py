"""What the training jobs share: weights at the start, the state, batches, gathered results."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from orbax.checkpoint import CheckpointManager

from dinosae_jax.data import images, latents
from dinosae_jax.flow.convention import LatentConvention
from dinosae_jax.runtime import files, jit, sharding
from dinosae_jax.train import checkpoint, initialise, loop, roles
from dinosae_jax.train import state as state_lib

Tree = Any
Variables = dict[str, dict[str, Tree]]
Batches = Iterator[dict[str, np.ndarray]]
Source = images.ImageSource | latents.LatentSource


@dataclasses.dataclass
class Prepared:
    """A stage that is ready to run.

    Attributes:
      task: for the loop.
      record: what each checkpoint carries.
      batches: first step -> this process's training batches from there on.
      restore: manager -> state, the newest good checkpoint's or a new one.
      finish: state -> None, writes the pictures.
    """

    task: loop.Task
    record: dict[str, Any]
    batches: Callable[[int], Batches]
    restore: Callable[[CheckpointManager], state_lib.TrainState]
    finish: Callable[[state_lib.TrainState], None]


def find_variables(
    config: ml_collections.ConfigDict,
    draw: Callable[[jax.Array], Variables],
    trained: tuple[str, ...],
    convention: LatentConvention,
) -> tuple[Variables, list[str]]:
    """Every role at step 0, and the notes that go with the weights.

    Args:
      config: init_from, weights, random_frozen_ok, model, seed.
      draw: key -> random variables of every role of the stage.
      trained: the roles that may start from a random draw.
      convention: this run's, compared with that of `init_from`.

    Raises:
      ValueError: for missing weights, or weights that do not fit.
    """
    key = jax.random.PRNGKey(config.seed)
    needed = tuple(jax.eval_shape(draw, key))
    found: Variables = {}
    notes: list[str] = []
    if config.init_from:
        source = initialise.open_source(config.init_from)
        found = {role: tree for role, tree in source.variables.items() if role in needed}
        initialise.check_agreement(source, config.model.to_dict(), convention, tuple(found))
        notes += source.notes
    for role in initialise.NETWORKS:
        if role not in needed or role in found or role in trained:
            continue
        path = config.get("weights", {}).get(role)
        if path:
            found[role] = initialise.load_frozen(role, path, config.model)
        else:
            notes.append(initialise.require_frozen(role, tuple(config.random_frozen_ok)))
    missing = [role for role in needed if role not in found]
    if missing:  # the compiler drops what is not returned

        def draw_missing(key: jax.Array) -> Variables:
            drawn = draw(key)
            return {role: drawn[role] for role in missing}

        found |= jax.device_get(jit.jit_once(draw_missing)(key))
    return found, notes


def restore(
    manager: CheckpointManager,
    create: Callable[[Variables], state_lib.TrainState],
    trained: Variables,
    mesh: jax.sharding.Mesh,
) -> tuple[state_lib.TrainState, dict[str, Any] | None]:
    """The newest good checkpoint's state and record, or a new state and None."""
    shapes = jax.eval_shape(create, trained)
    places = sharding.shardings(shapes, mesh)
    target = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )
    restored = checkpoint.restore_newest(manager, target)
    if restored is None:
        return jit.jit_once(create, out_shardings=places)(trained), None
    return restored


def check_data(
    saved: dict[str, Any], record: dict[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Raises ValueError where a checkpoint was trained on other data than this run has."""
    if saved["data"] != record["data"]:
        raise ValueError(
            f"this workdir was trained on other data than data.source={config.data.source!r} "
            "holds now; give the same data or another --workdir"
        )


def check_frozen(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint was trained around other frozen networks."""
    both = record["frozen"].keys() & saved["frozen"].keys()
    changed = sorted(role for role in both if record["frozen"][role] != saved["frozen"][role])
    if changed:
        raise ValueError(
            f"this workdir was trained around another {' and '.join(changed)}; name the same "
            "weights in init_from and weights, or use another --workdir"
        )


def store(workdir: pathlib.Path, variables: Variables, trained: tuple[str, ...]) -> dict[str, Any]:
    """Writes the frozen roles and the overview of all roles into a workdir.

    Returns:
      frozen role -> [file name, sha256], the form that records keep.
    """
    overview = parameter_overview.get_parameter_overview(
        {role: variables[role]["params"] for role in sorted(variables)}, include_stats=False
    )
    if jax.process_index() == 0:
        files.write_text(workdir / "parameters.txt", overview + "\n")
    return {
        role: list(roles.write(workdir / initialise.FROZEN_FOLDER, role, variables[role]))
        for role in variables
        if role not in trained
    }


def fields_of(source: Source) -> tuple[str, ...]:
    """The fields of its batches that a flow is trained on."""
    if isinstance(source, latents.LatentSource):
        return tuple(field.name for field in source.fields)
    return ("image", "label")


def reader(source: Source) -> Any:
    """The module that makes batches of a source: `data.images` or `data.latents`."""
    return latents if isinstance(source, latents.LatentSource) else images


def training_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    fields: tuple[str, ...],
    batch_size: int,
    start: int = 0,
) -> Batches:
    """This process's rows of the global training batches, from step `start` on."""
    found = reader(source).train_batches(
        source,
        config.data,
        batch_size=batch_size,
        seed=config.seed,
        start_step=start,
        rows=sharding.local_rows(mesh, batch_size),
    )
    return ({name: batch[name] for name in fields} for batch in found)


def evaluation_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Batches:
    """This process's rows of batches of at most eval.images images, padded to all devices."""
    size = device_multiple(config.eval.batch_size, mesh)
    limit = -(-config.eval.images // size)
    rows = sharding.local_rows(mesh, size)
    found = reader(source).eval_batches(source, config.data, batch_size=size, rows=rows)
    return itertools.islice(found, limit)


def device_multiple(count: int, mesh: jax.sharding.Mesh) -> int:
    """`count` rounded up to a multiple of the devices."""
    return -(-count // mesh.size) * mesh.size
