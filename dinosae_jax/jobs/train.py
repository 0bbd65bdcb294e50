"""Trains one stage, or a chain of stages in one workdir.

A stage's workdir holds config.json, checkpoints/, frozen/, metrics.jsonl, timing.jsonl, pictures,
notes.json and, when finished, DONE. A chain's workdir holds one folder a stage and the report.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import ml_collections

from dinosae_jax import config as config_lib
from dinosae_jax import rules
from dinosae_jax.eval import report
from dinosae_jax.jobs import train_autoencoder, train_flow
from dinosae_jax.runtime import console, files, hardware, precision, sharding, stopping
from dinosae_jax.train import loop
from dinosae_jax.weights import checkpoint, conversion, weight_source

DONE = "DONE"
KINDS = {  # by which file a folder is told
    "chain.json": "a chain of stages",
    "config.json": "the run of one stage",
    weight_source.EXPORT_FILE: "an export",
    conversion.METADATA_FILE: "converted weights",
}


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains what the config describes; finished stages are skipped, interrupted ones go on.

    Args:
      config: of one stage, or with `chain` and `stages`.
      workdir: folder of the run.

    Raises:
      ValueError: for every disagreement that can be seen before compilation.
      stopping.Interrupted: after a signal, with everything saved.
    """
    folder = pathlib.Path(workdir).expanduser()
    check_kind(folder, is_chain="chain" in config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with stopping.StopRequest() as stop:
            if "chain" in config:
                _run_chain(config, folder, stop)
            else:
                run_stage(config, folder, stop)
    except stopping.Interrupted:
        _report(folder)
        raise
    _report(folder)


def _report(folder: pathlib.Path) -> None:
    if jax.process_index() == 0:
        report.write_report(folder)
        console.report(f"The report is {folder / 'report.html'}")


def _run_chain(
    config: ml_collections.ConfigDict, folder: pathlib.Path, stop: stopping.StopRequest
) -> None:
    if jax.process_index() == 0:
        files.write_json(folder / "chain.json", {"stages": list(config.chain)})
        files.write_json(folder / "notes.json", list(config.notes))
    for note in config.notes:
        console.report(note)
    for name in config.chain:
        stage = config.stages[name]
        before = folder / stage.init_from if stage.init_from in config.chain else None
        try:
            run_stage(stage, folder / name, stop, before)
        except ValueError as error:
            raise rules.in_stage(name, error) from error


def run_stage(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    stop: stopping.StopRequest | None = None,
    init_from: pathlib.Path | None = None,
) -> None:
    """Trains one stage to its last step and marks it DONE.

    Args:
      config: of one stage.
      workdir: of the stage.
      stop: what the caller has entered; None where nobody asks for a stop.
      init_from: the stage of a chain that `config.init_from` names; None where that is a path.

    Raises:
      ValueError: for every disagreement that can be seen before compilation.
      stopping.Interrupted: after a signal, with everything saved.
    """
    started = time.monotonic()
    stop = stop or stopping.StopRequest()
    config = precision.resolve_config(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    claim(workdir, config)
    done = workdir / DONE
    if done.exists() and json.loads(done.read_text())["step"] >= config.steps:
        console.report(f"{config.name}: finished before, skipped")
        return
    if number := stop.agreed():
        raise stopping.Interrupted(f"{config.name} was not started", number)
    if init_from:  # after config.json, which holds the name: a chain's folder can be moved
        config.init_from = str(init_from)
    job = train_flow if "dit" in config.trainable else train_autoencoder
    prepared = job.prepare(config, workdir, mesh)
    if jax.process_index() == 0:
        files.write_json(workdir / "notes.json", prepared.record["notes"])
    for note in prepared.record["notes"]:
        console.report(f"{config.name}: {note}")
    with checkpoint.open_manager(workdir, config.checkpoint.keep) as manager:
        state = prepared.restore(manager)
        state = loop.run(
            prepared.task,
            state,
            prepared.batches(int(state.step)),
            config,
            workdir,
            manager,
            prepared.record,
            mesh,
            stop,
        )
    prepared.finish(state)
    if jax.process_index() == 0:
        files.write_json(
            done,
            {
                "step": int(state.step),
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_bytes": hardware.peak_memory(),
            },
        )


def check_kind(folder: pathlib.Path, is_chain: bool) -> None:
    """Raises ValueError where a workdir holds something that the files of this run would hide."""
    ours = "chain.json" if is_chain else "config.json"
    for name, what in KINDS.items():
        if name != ours and (folder / name).exists():
            raise ValueError(
                f"--workdir is the folder of one run; got {folder}, which holds {what} ({name}); "
                "use another or delete it"
            )


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, or compares with the one that is there.

    Raises:
      ValueError: where the workdir holds a run of another config.
    """
    path = workdir / "config.json"
    begun = checkpoint.newest(workdir) or (workdir / DONE).exists()
    if begun and path.exists() and config.on_mismatch == "refuse":
        ours, theirs = json.loads(config_lib.to_json(config)), json.loads(path.read_text())
        for field in config_lib.CONTINUABLE:
            _drop(ours, field)
            _drop(theirs, field)
        lines = config_lib.differences(ours, theirs)
        if lines:
            raise ValueError(
                f"{workdir} holds a different run ({'; '.join(lines[:5])}); use another --workdir, "
                "delete it, or go on regardless with --config.on_mismatch=continue"
            )
    if jax.process_index() == 0:
        files.write_json(path, json.loads(config_lib.to_json(config)))


def _drop(tree: dict[str, Any], field: str) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.get(parent, {})
    tree.pop(last, None)
