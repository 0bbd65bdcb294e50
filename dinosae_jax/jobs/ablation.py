"""Trains the arms of a comparison with equal steps and reports them side by side.

An arm is a set of changes to one base config. Every arm runs with every seed in
`workdir/<arm>/seed<k>`, a normal workdir each, so that an interrupted ablation goes on. The
results of autoencoders are the last evaluation of each run: results.json, a table, and curves of
all arms. Flows are compared by their samples (`ablation_flow`).
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from dinosae_jax import rules
from dinosae_jax.eval import curves
from dinosae_jax.jobs import ablation_flow, measure
from dinosae_jax.runtime import console, files, stopping
from dinosae_jax.train import stages


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Runs every arm with every seed, then writes the comparison.

    Args:
      config: `base` (a training config), `arms` {name: {'path/to/field': value}}, `order` (names of
        the arms), `seeds`, and `metrics` (names of the evaluation that the table shows), or for
        flows what `configs/ablation_flow.py` has.
      workdir: folder of the comparison.
    """
    folder = pathlib.Path(workdir).expanduser()
    of_flows = "flow" in config.base
    with stopping.StopRequest() as stop:
        if of_flows:
            measure.pretrained_weights(config.weights)  # refused before anything is trained
            config = config.copy_and_resolve_references()
            config.base.init_from = ablation_flow.train_autoencoder(config, folder, stop)
        for arm in config.order:
            for seed in config.seeds:
                stage = arm_config(config, arm, seed)
                stages.run_stage(stage, folder / arm / f"seed{seed}", stop)
        if of_flows:
            ablation_flow.compare(config, folder, stop)
            return
    if jax.process_index() == 0:
        write_comparison(folder, tuple(config.order), tuple(config.seeds), tuple(config.metrics))


def arm_config(config: ml_collections.ConfigDict, arm: str, seed: int) -> ml_collections.ConfigDict:
    """The base config with the changes of one arm; a value None removes the field.

    Raises:
      ValueError: where the changed config breaks a rule.
    """
    stage = config.base.copy_and_resolve_references()
    for field, value in config.arms[arm].items():
        *parents, last = field.split("/")
        node = stage
        for parent in parents:
            node = node[parent]
        if value is None:
            with node.unlocked():
                del node[last]
        else:
            node[last] = value
    stage.seed = seed
    stage.name = f"{arm} seed {seed}"
    rules.validate(stage)
    return stage


def write_comparison(
    folder: pathlib.Path, arms: tuple[str, ...], seeds: tuple[int, ...], metrics: tuple[str, ...]
) -> str:
    """Writes results.json, table.md and curves.png from the runs' metrics, and prints the table.

    Returns:
      The table: a row an arm, mean and standard deviation over the seeds of each last evaluation.
    """
    series = {
        arm: [_evaluations(folder / arm / f"seed{seed}" / "metrics.jsonl") for seed in seeds]
        for arm in arms
    }
    results: dict[str, Any] = {}
    lines = [f"| arm | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for arm, runs in series.items():
        cells = []
        for metric in metrics:
            last = np.array([run[-1][f"eval/{metric}"] for run in runs], np.float64)
            results.setdefault(arm, {})[metric] = {
                "mean": float(last.mean()),
                "deviation": float(last.std(ddof=1)) if len(last) > 1 else None,
                "seeds": last.tolist(),
            }
            spread = f" ± {last.std(ddof=1):.2g}" if len(last) > 1 else ""
            cells.append(f"{last.mean():.4g}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", table + "\n")
    curves.write_comparison(folder / "curves.png", series, [f"eval/{m}" for m in metrics])
    console.report(table)
    return table


def _evaluations(path: pathlib.Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval/") for name in line)]
