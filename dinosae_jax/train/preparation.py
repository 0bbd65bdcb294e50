"""Weights and state of a task, and the checks of a run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from clu import parameter_overview
from etils import epath

from dinosae_jax.data import loading
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import agreement, console, files, jit, sharding
from dinosae_jax.train import state as state_lib
from dinosae_jax.weights import checkpoint, role_files, weight_source

Tree = Any
Variables = dict[str, dict[str, Tree]]


class Found(NamedTuple):
    """The weights of a stage at step 0.

    Attributes:
      variables: every role.
      notes: sentences that travel with the weights.
      source: of `init_from`: path, step and sha256 of the record; empty without one.
      weights: the manifest of the published weights, see `licences.entries`.
    """

    variables: Variables
    notes: list[str]
    source: dict[str, Any]
    weights: dict[str, Any]


def find_variables(
    config: ml_collections.ConfigDict,
    draw: Callable[[jax.Array], Variables],
    trained: tuple[str, ...],
    convention: LatentConvention,
) -> Found:
    """Every role at step 0, the notes that go with the weights, and where they come from.

    Args:
      config: init_from, weights, random_frozen_ok, model, seed.
      draw: key -> random variables of every role of the stage.
      trained: the roles that may start from a random draw.
      convention: this run's, compared with that of `init_from`.

    Raises:
      ValueError: for missing weights, weights that do not fit, or those of an unfinished run.
    """
    key = jax.random.PRNGKey(config.seed)
    needed = tuple(jax.eval_shape(draw, key))
    found: Variables = {}
    notes: list[str] = []
    origin: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    if config.init_from:
        path = agreement.from_first(lambda: choose_source(config.init_from))
        source = weight_source.open_weights(path)
        found = {role: tree for role, tree in source.variables.items() if role in needed}
        weight_source.check_agreement(source, config.model.to_dict(), convention, tuple(found))
        notes += source.notes
        origin = weight_source.identity(source)
        manifest |= source.weights
    # A frozen stem of the encoder's own patches comes with the encoder.
    own_patches = config.model.stem.get("kind") == "patch" and "stem" not in (*found, *trained)
    borrowed = ("stem",) if own_patches and "stem" in needed else ()
    for role in weight_source.NETWORKS:
        path = config.get("weights", {}).get(role)
        if role in found and path:
            weight_source.check_effective(role, path, found[role], config.init_from, config.model)
        if role not in needed or role in found or role in trained or role in borrowed:
            continue
        if path:
            found[role] = weight_source.load_frozen(role, path, config.model)
            entries = weight_source.manifest(path)
            manifest |= {name: entry for name, entry in entries.items() if name == role}
        else:
            allowed = tuple(config.random_frozen_ok)
            notes.append(weight_source.require_frozen(role, allowed, config.model))
    missing = [role for role in needed if role not in found and role not in borrowed]
    if missing:  # the compiler drops what is not returned

        def draw_missing(key: jax.Array) -> Variables:
            drawn = draw(key)
            return {role: drawn[role] for role in missing}

        found |= jax.device_get(jit.jit_once(draw_missing)(key))
    if borrowed:
        found["stem"] = {"params": found["vit"]["params"]["patch_embed"]}
    return Found(found, notes, origin, manifest)


def choose_source(path: str) -> str:
    """What `init_from` names: of a workdir the newest checkpoint, of everything else itself.

    Raises:
      ValueError: for a workdir whose run has not reached its last step.
    """
    folder = files.path(path)
    step = None if weight_source.is_folder_of_weights(folder) else checkpoint.newest(folder)
    if step is None:
        return path
    done = folder / weight_source.DONE
    reached = json.loads(done.read_text())["step"] if done.exists() else None
    if reached != int(step.name):
        raise ValueError(
            f"init_from names a finished run; got {path}, which has no {done.name} for its newest "
            f"checkpoint, step {step.name}; let it finish, or name that checkpoint: "
            f"--config.init_from={step}"
        )
    return str(step)


def agree_on_inputs(
    record: dict[str, Any], variables: Variables, sources: Sequence[loading.Source]
) -> None:
    """Compares, over all processes, what training starts from.

    Args:
      record: of the checkpoints.
      variables: every role at step 0.
      sources: data for training and evaluation.

    Raises:
      ValueError: on every process, where one has other weights or data.
    """
    if jax.process_count() == 1:
        return
    agreement.require_equal(
        "weights and data",
        {
            "init_from": record["source"],
            "weights": {role: role_files.sha256(variables[role]) for role in variables},
            "data": [source.fingerprint for source in sources],
        },
    )


def restore_or_create(
    config: ml_collections.ConfigDict,
    manager: checkpoint.Manager,
    create: Callable[[Variables], state_lib.TrainState],
    trained: Variables,
    mesh: jax.sharding.Mesh,
) -> tuple[state_lib.TrainState, dict[str, Any] | None]:
    """The newest good checkpoint's state and record, or a new state and None.

    Raises:
      ValueError: where there is no good checkpoint and the run had got further, unless
        `on_mismatch` is 'restart'.
    """
    shapes = jax.eval_shape(create, trained)
    places = sharding.shardings(shapes, mesh)
    target = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )
    restart = config.on_mismatch == "restart"
    try:
        restored = checkpoint.restore_newest(manager, target)
    except checkpoint.NoneWhole:
        if not restart:
            raise
        restored = None
    if restored is not None:
        return restored
    workdir = checkpoint.workdir_of(manager)
    lost = agreement.from_first(lambda: checkpoint.lost_work(workdir))
    if lost and not restart:
        raise ValueError(
            f"a run that had got further starts at step 0 only where it is told to; got no "
            f"checkpoint, but {lost}; put the checkpoint back, use another --workdir, or pass "
            "--config.on_mismatch=restart"
        )
    if lost:
        console.report(f"{config.name}: starts at step 0, as it was told, beside {lost}")
    checkpoint.note_newest(workdir, None)
    return jit.jit_once(create, out_shardings=places)(trained), None


def check_data(
    saved: dict[str, Any], record: dict[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Raises ValueError where a checkpoint was trained on other data than this run has."""
    if saved["data"] != record["data"]:
        raise ValueError(
            "a workdir is trained on the same data throughout; got other data in "
            f"data.source={config.data.source!r}; give the same data or another --workdir"
        )


def check_start(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError where `init_from` names another run or folder than at the start.

    The same place may hold more by now: a run that went on. Another place must hold the same.
    """
    places = [files.place(r["config"]["init_from"]) for r in (saved, record)]
    sums = [r["source"].get("sha256") for r in (saved, record)]
    if places[0] != places[1] and sums[0] != sums[1]:
        raise ValueError(
            "a workdir continues one start; got other weights in "
            f"init_from={record['config']['init_from']!r} than were in "
            f"{saved['config']['init_from']!r}; name those or use another --workdir"
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
    workdir: epath.Path, variables: Variables, trained: tuple[str, ...]
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
