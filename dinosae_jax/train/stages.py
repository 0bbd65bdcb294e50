"""One stage: its workdir is claimed, its task prepared, run and marked DONE."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax.runtime import (
    agreement,
    console,
    files,
    hardware,
    lease,
    precision,
    sharding,
    stopping,
)
from dinosae_jax.train import autoencoder_task, flow_task, latent_cache, loop
from dinosae_jax.train.task import Run
from dinosae_jax.weights import checkpoint, conversion, weight_source

DONE = weight_source.DONE
PACKAGE = pathlib.Path(__file__).parents[1]
KINDS = {  # file that identifies a folder -> what the folder holds
    "chain.json": "a chain of stages",
    "config.json": "the run of one stage",
    weight_source.EXPORT_FILE: "an export",
    conversion.METADATA_FILE: "converted weights",
}


def run_stage(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    stop: stopping.StopRequest | None = None,
    earlier: Mapping[str, epath.Path] = MappingProxyType({}),
) -> None:
    """Trains one stage to its last step and marks it DONE, or writes a chain's latent cache.

    Args:
      config: of one stage; of `configs/encode.py` for a cache.
      workdir: of the stage.
      stop: what the caller has entered; None where nobody asks for a stop.
      earlier: stage of the same chain -> its folder; `config.init_from` and `config.data.latents`
        may name one instead of a path.

    Raises:
      ValueError: for every disagreement that can be seen before compilation.
      stopping.Interrupted: after a signal, with everything saved.
    """
    started = time.monotonic()
    stop = stop or stopping.StopRequest()
    if config.job == "encode":
        with lease.hold(workdir):
            latent_cache.write(_placed(config, earlier), workdir, stop)
        return
    config = precision.resolve_config(config)
    agree_on_program(config)
    # What is not the step computes likewise: evaluation, pictures, the norms of tokens.
    products = jax.default_matmul_precision(config.matmul_precision.compute)
    with lease.hold(workdir), products:
        _run_held(config, workdir, stop, earlier, started)


def agree_on_program(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError on all processes where one has another config or other code."""
    if jax.process_count() > 1:
        facts = {
            "config": json.loads(config_lib.to_json(config)),
            "sha256 of the package": files.folder_sha256(PACKAGE, "*.py"),
        }
        agreement.require_equal("config and code", facts)


def _run_held(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    stop: stopping.StopRequest,
    earlier: Mapping[str, epath.Path],
    started: float,
) -> None:
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    moved = claim(workdir, config)
    settings = json.loads(config_lib.to_json(config))  # a chain's hold names, not places
    done = workdir / DONE
    finished = done.exists() and json.loads(done.read_text())["step"] >= config.steps
    if finished and not moved:
        console.report(f"{config.name}: finished before, skipped")
        return
    if number := stop.agreed():
        raise stopping.Interrupted(f"{config.name} was not started", number)
    config = _placed(config, earlier)
    prepare = (flow_task if "dit" in config.trainable else autoencoder_task).prepare
    task = prepare(config, workdir, mesh)
    if jax.process_index() == 0:
        files.write_json(workdir / "notes.json", task.record["notes"])
    for note in task.record["notes"]:
        console.report(f"{config.name}: {note}")
    keep, milestones = config.checkpoint.keep, config.checkpoint.milestones
    with checkpoint.open_manager(workdir, keep, milestones) as manager:
        if moved:
            task.restore(manager)  # compares what is there now with what was there
            _write_config(workdir, settings)
        if finished:
            console.report(f"{config.name}: finished before, skipped; its inputs have moved")
            return
        state = loop.run(task, Run(config, workdir, mesh, manager, stop))
    task.finish(state)
    if jax.process_index() == 0:
        files.write_json(
            done,
            {
                "step": int(state.step),
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_bytes": hardware.peak_memory(),
            },
        )


def _placed(
    config: ml_collections.ConfigDict, earlier: Mapping[str, epath.Path]
) -> ml_collections.ConfigDict:
    """A copy with the folders of earlier stages where their names stand."""
    config = config.copy_and_resolve_references()
    if config.init_from in earlier:
        config.init_from = str(earlier[config.init_from])
    if config.data.get("latents") in earlier:
        config.data.latents = str(earlier[config.data.latents])
    return config


def check_kind(folder: epath.Path, is_chain: bool) -> None:
    """Raises ValueError where a workdir holds something that the files of this run would hide."""
    ours = "chain.json" if is_chain else "config.json"
    for name, what in KINDS.items():
        if name != ours and (folder / name).exists():
            raise ValueError(
                f"--workdir is the folder of one run; got {folder}, which holds {what} ({name}); "
                "use another or delete it"
            )


def claim(workdir: epath.Path, config: ml_collections.ConfigDict) -> bool:
    """Writes config.json, or compares the config with an existing file.

    Returns:
      whether inputs are named by other places than before: then what they hold is to be compared
      with the newest checkpoint's record, before config.json is written.

    Raises:
      ValueError: where the workdir holds a run of another config.
    """
    path, newest = workdir / "config.json", checkpoint.newest(workdir)
    settings, moved = json.loads(config_lib.to_json(config)), False
    begun = newest or (workdir / DONE).exists()
    if begun and path.exists() and config.on_mismatch != "continue":
        ours, theirs = json.loads(config_lib.to_json(config)), json.loads(path.read_text())
        for field in config_lib.CONTINUABLE:
            _pop(ours, field)
            _pop(theirs, field)
        if newest:  # without its record nothing says what a place held
            moved = _pop_places(ours) != _pop_places(theirs)
        lines = config_lib.differences(ours, theirs)
        if lines:
            raise ValueError(
                f"a workdir belongs to one run; got {workdir} of a different run "
                f"({'; '.join(lines[:5])}); use another --workdir, delete it, or continue "
                "nevertheless with --config.on_mismatch=continue"
            )
    if not moved:
        _write_config(workdir, settings)
    return moved


def _write_config(workdir: epath.Path, settings: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        files.write_json(workdir / "config.json", settings)


def _pop_places(tree: dict[str, Any]) -> list[Any]:
    """What the fields of inputs name, however it is spelled; the fields are removed."""
    return [jax.tree.map(files.place, _pop(tree, field)) for field in config_lib.PLACES]


def _pop(tree: dict[str, Any], field: str) -> Any:
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.get(parent, {})
    return tree.pop(last, None)
