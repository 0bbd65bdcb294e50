"""Trains one stage, or a chain of stages in one workdir.

A stage's workdir holds config.json, checkpoints/, frozen/, metrics.jsonl, timing.jsonl, pictures,
notes.json and, when finished, DONE. A chain's workdir holds one folder per stage and the report.
A chain may also encode its images between two stages (a stage with `job="encode"`), for a flow
that names that stage in `data.latents`.
"""

from __future__ import annotations

import jax
import ml_collections
from etils import epath

from dinosae_jax import rules
from dinosae_jax.report import html_report
from dinosae_jax.runtime import console, files, stopping
from dinosae_jax.train import stages


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Trains what the config describes; finished stages are skipped, interrupted stages resume.

    Args:
      config: config of one stage, or a config with `chain` and `stages`.
      folder: folder of the run.

    Raises:
      ValueError: for every disagreement that can be seen before compilation.
      stopping.Interrupted: after a signal, with everything saved.
    """
    stages.check_kind(folder, is_chain="chain" in config)
    with stopping.StopRequest() as stop:
        try:
            if "chain" in config:
                _run_chain(config, folder, stop)
            else:
                stages.run_stage(config, folder, stop)
        except stopping.Interrupted:
            _report(folder)
            raise
        _report(folder)


def _report(folder: epath.Path) -> None:
    if jax.process_index() == 0:
        html_report.write_report(folder)
        console.report(f"The report is {folder / 'report.html'}")


def _run_chain(
    config: ml_collections.ConfigDict, folder: epath.Path, stop: stopping.StopRequest
) -> None:
    trained = [name for name in config.chain if config.stages[name].job == "train"]
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "chain.json", {"stages": trained})
        files.write_json(folder / "notes.json", list(config.notes))
    for note in config.notes:
        console.report(note)
    earlier: dict[str, epath.Path] = {}
    for name in config.chain:
        try:
            stages.run_stage(config.stages[name], folder / name, stop, earlier)
        except ValueError as error:
            raise rules.in_stage(name, error) from error
        earlier[name] = folder / name
