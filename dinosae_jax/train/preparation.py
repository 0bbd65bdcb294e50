"""Weights and state of a task, and the checks of a run that is resumed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from clu import parameter_overview
from orbax.checkpoint import CheckpointManager

from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import files, jit, sharding
from dinosae_jax.train import state as state_lib
from dinosae_jax.weights import checkpoint, role_files, weight_source

Tree = Any
Variables = dict[str, dict[str, Tree]]


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
        source = weight_source.open_weights(config.init_from)
        found = {role: tree for role, tree in source.variables.items() if role in needed}
        weight_source.check_agreement(source, config.model.to_dict(), convention, tuple(found))
        notes += source.notes
    for role in weight_source.NETWORKS:
        path = config.get("weights", {}).get(role)
        if role in found and path:
            weight_source.check_effective(role, path, found[role], config.init_from)
        if role not in needed or role in found or role in trained:
            continue
        if path:
            found[role] = weight_source.load_frozen(role, path, config.model)
        else:
            notes.append(weight_source.require_frozen(role, tuple(config.random_frozen_ok)))
    missing = [role for role in needed if role not in found]
    if missing:  # the compiler drops what is not returned

        def draw_missing(key: jax.Array) -> Variables:
            drawn = draw(key)
            return {role: drawn[role] for role in missing}

        found |= jax.device_get(jit.jit_once(draw_missing)(key))
    return found, notes


def restore_or_create(
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
            "a workdir is trained on the same data throughout; got other data in "
            f"data.source={config.data.source!r}; give the same data or another --workdir"
        )


def check_frozen(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint was trained around other frozen networks."""
    both = record["frozen"].keys() & saved["frozen"].keys()
    changed = sorted(role for role in both if record["frozen"][role] != saved["frozen"][role])
    if changed:
        raise ValueError(
            f"a workdir is trained with the same frozen networks throughout; got another "
            f"{' and '.join(changed)}; name the same weights in init_from and weights, or use "
            "another --workdir"
        )


def store_frozen(
    workdir: pathlib.Path, variables: Variables, trained: tuple[str, ...]
) -> dict[str, Any]:
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
        role: list(role_files.write(workdir / weight_source.FROZEN_FOLDER, role, variables[role]))
        for role in variables
        if role not in trained
    }
