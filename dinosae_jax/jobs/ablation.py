"""Trains the arms of a comparison with equal steps and reports them side by side.

An arm is a set of changes to one base config. Every arm runs with every seed in
`workdir/<arm>/seed<k>`, a normal workdir, so that an interrupted ablation can resume. The
results of autoencoders are the last evaluation of each run (results.json, a table, and curves of
all arms) and, with a pretrained network, what `autoencoder_comparison` measures. Flows are
compared by their samples, since the losses of the arms have different targets: in one feature
space for all, then one flow sampled by every method at several step counts and decoded at several
radii.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax import rules
from dinosae_jax.data import png
from dinosae_jax.eval.protocols import autoencoder_comparison, flow_comparison, inputs, scores
from dinosae_jax.eval.protocols.photographs import Photographs
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models.autoencoder import unit_interval
from dinosae_jax.report import comparison_tables, curves
from dinosae_jax.runtime import console, files, sharding, stopping
from dinosae_jax.train import stages


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Runs every arm with every seed, then writes the comparison.

    Args:
      config: `base` (a training config), `arms` {name: {'path/to/field': value}}, `order` (names of
        the arms), `once` (those that the first seed alone trains), `seeds`, and `metrics` (names of
        the evaluation that the table shows), or for flows what `configs/ablation_flow.py` has.
      folder: folder of the comparison.
    """
    inputs.pretrained_weights(config.weights)  # refused before anything is trained
    with stopping.StopRequest() as stop:
        for seed in config.seeds:
            once = config.get("once", ()) if seed == config.seeds[0] else ()
            for arm in (*config.order, *once):
                stage = arm_config(config, arm, seed)
                stages.run_stage(stage, scores.workdir_of(folder, arm, seed), stop)
        if "flow" in config.base:
            compare_flows(config, folder, stop)
            return
        if jax.process_index() == 0:
            metrics = tuple(config.metrics)
            write_comparison(folder, tuple(config.order), tuple(config.seeds), metrics)
        if any(config.weights.values()):
            compare_autoencoders(config, folder, stop)


def arm_config(config: ml_collections.ConfigDict, arm: str, seed: int) -> ml_collections.ConfigDict:
    """Returns the base config with the changes of one arm; `without` lists fields that it lacks.

    Raises:
      ValueError: where the changed config breaks a rule.
    """
    stage = config.base.copy_and_resolve_references()
    changes = config.arms[arm].to_dict()
    with stage.unlocked():
        for field in changes.pop("without", ()):
            node, last = _node(stage, field)
            del node[last]
        for field, value in changes.items():
            node, last = _node(stage, field)
            node[last] = value
    stage.seed = seed
    stage.name = f"{arm} seed {seed}"
    rules.validate(stage)
    return stage


def _node(config: ml_collections.ConfigDict, field: str) -> tuple[Any, str]:
    """The group of 'path/to/field', and the name of the field in it."""
    *parents, last = field.split("/")
    return functools.reduce(operator.getitem, parents, config), last


def write_comparison(
    folder: epath.Path, arms: tuple[str, ...], seeds: tuple[int, ...], metrics: tuple[str, ...]
) -> str:
    """Writes results.json, table.md and curves.png from the runs' metrics, and prints the table.

    Returns:
      The table: one row per arm, mean and standard deviation of the last evaluations over seeds.
    """
    series = {
        arm: [_evaluations(scores.workdir_of(folder, arm, seed)) for seed in seeds] for arm in arms
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


def _evaluations(workdir: epath.Path) -> list[dict[str, float]]:
    written = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    return [line for line in lines if any(name.startswith("eval/") for name in line)]


def compare_autoencoders(
    config: ml_collections.ConfigDict, folder: epath.Path, stop: stopping.StopRequest
) -> str:
    """Measures every arm on held-out images, unless scores.json has it; writes and prints tables.

    Args:
      config: config of `configs/ablation_sae.py`, whose arms are trained.
      folder: folder of the comparison.
      stop: checked before each score.

    Returns:
      The tables, Markdown.

    Raises:
      ValueError: where the folder holds scores of another comparison; see `Judge`.
      stopping.Interrupted: after a signal, with every score saved.
    """

    @functools.cache
    def judge() -> autoencoder_comparison.Judge:
        return autoencoder_comparison.Judge(config, network)

    @functools.lru_cache(maxsize=1)
    def autoencoder(arm: str, seed: int) -> Autoencoder:
        workdir = scores.workdir_of(folder, arm, seed)
        return Autoencoder.load(workdir, "float32", batch_size=config.batch_size)

    def measure(arm: str, seed: int) -> scores.Score:
        return judge()(autoencoder(arm, seed))

    some = config.order[0], config.seeds[0]
    network = inputs.feature_network(
        config.weights, sharding.make_mesh(), lambda: autoencoder(*some)
    )
    measured = scores.Scores(folder / "scores.json", scores.recipe_of(config, network))
    measured.add("photographs", lambda: judge().photographs.floor(config.images))
    measured.add("teacher", lambda: judge().teacher(autoencoder(*some)))
    for arm, seed in itertools.product(config.order, config.seeds):
        key = scores.key_of(arm, seed)
        if stopped := stop.agreed():
            raise stopping.Interrupted(f"the ablation stopped before {key}", stopped)
        measured.add(key, functools.partial(measure, arm, seed))
    tables = comparison_tables.autoencoder_tables(config, measured.scores, network)
    if jax.process_index() == 0:
        files.write_text(folder / "tables.md", tables + "\n")
    console.report(tables)
    return tables


def compare_flows(
    config: ml_collections.ConfigDict, folder: epath.Path, stop: stopping.StopRequest
) -> str:
    """Computes the scores that are not in scores.json, and writes tables and a figure.

    Args:
      config: config of `configs/ablation_flow.py`, whose arms are trained.
      folder: folder of the comparison.
      stop: checked before each score.

    Returns:
      The tables, Markdown.

    Raises:
      ValueError: where the folder holds scores of another comparison.
      stopping.Interrupted: after a signal, with every score saved.
    """
    some = scores.workdir_of(folder, config.order[0], config.seeds[0])
    autoencoder = Autoencoder.load(some, "float32", batch_size=config.batch_size)
    network = inputs.feature_network(config.weights, autoencoder.mesh, lambda: autoencoder)

    @functools.cache
    def photographs() -> Photographs:
        return Photographs(config, config.base.data, network)

    def reconstructed() -> scores.Score:
        there = photographs()
        made = png.as_picture(autoencoder.reconstruct(unit_interval(there.held_out)))
        return there.measure(there.embed(made), there.labels)

    def measure(setting: flow_comparison.Setting) -> scores.Score:
        return flow_comparison.measure(config, folder, photographs(), setting)

    measured = scores.Scores(folder / "scores.json", scores.recipe_of(config, network))
    measured.add("photographs", lambda: photographs().floor(config.samples))
    measured.add("reconstructions", reconstructed)
    for setting in flow_comparison.settings(config):
        if stopped := stop.agreed():
            raise stopping.Interrupted(f"{config.name} stopped before {setting.key}", stopped)
        measured.add(setting.key, functools.partial(measure, setting))
    text = comparison_tables.flow_tables(config, measured.scores, network)
    if jax.process_index() == 0:
        files.write_text(folder / "tables.md", text + "\n")
        comparison_tables.write_pictures(config, folder, measured.scores, network)
    console.report(text)
    return text
