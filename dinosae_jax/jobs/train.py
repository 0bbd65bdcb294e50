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
from dinosae_jax.eval import report
from dinosae_jax.jobs import train_autoencoder, train_flow
from dinosae_jax.train import checkpoint, logging, loop, sharding, stopping

DONE = "DONE"


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
        logging.report(f"The report is {folder / 'report.html'}")


def _run_chain(
    config: ml_collections.ConfigDict, folder: pathlib.Path, stop: stopping.StopRequest
) -> None:
    if jax.process_index() == 0:
        logging.write_json(folder / "chain.json", {"stages": list(config.chain)})
        logging.write_json(folder / "notes.json", list(config.notes))
    for note in config.notes:
        logging.report(note)
    for name in config.chain:
        stage = config.stages[name].copy_and_resolve_references()
        if stage.get("init_from") in config.chain:
            stage.init_from = str(folder / stage.init_from)
        run_stage(stage, folder / name, stop)


def run_stage(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    stop: stopping.StopRequest | None = None,
) -> None:
    """Trains one stage to its last step and marks it DONE.

    Args:
      config: of one stage.
      workdir: of the stage.
      stop: what the caller has entered; None where nobody asks for a stop.

    Raises:
      ValueError: for every disagreement that can be seen before compilation.
      stopping.Interrupted: after a signal, with everything saved.
    """
    started = time.monotonic()
    stop = stop or stopping.StopRequest()
    config = resolve(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    claim(workdir, config)
    done = workdir / DONE
    if done.exists() and json.loads(done.read_text())["step"] >= config.steps:
        logging.report(f"{config.name}: finished before, skipped")
        return
    job = train_flow if "dit" in config.trainable else train_autoencoder
    prepared = job.prepare(config, workdir, mesh)
    if jax.process_index() == 0:
        logging.write_json(workdir / "notes.json", prepared.record["notes"])
    for note in prepared.record["notes"]:
        logging.report(f"{config.name}: {note}")
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
        logging.write_json(
            done,
            {
                "step": int(state.step),
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_bytes": logging.peak_memory(),
            },
        )


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy with `dtype='auto'` replaced by what this machine computes in."""
    config = config.copy_and_resolve_references()
    if config.dtype == "auto":
        config.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, or compares with the one that is there.

    Raises:
      ValueError: where the workdir holds a run of another config.
    """
    path = workdir / "config.json"
    if checkpoint.newest(workdir) and path.exists() and config.on_mismatch == "refuse":
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
        logging.write_json(path, json.loads(config_lib.to_json(config)))


def _drop(tree: dict[str, Any], field: str) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.get(parent, {})
    tree.pop(last, None)
