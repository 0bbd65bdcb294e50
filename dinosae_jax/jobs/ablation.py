"""Trains the arms of a comparison with equal steps and reports them side by side.

An arm is a set of changes to one base config. Every arm runs with every seed in
`workdir/<arm>/seed<k>`, a normal workdir, so that an interrupted ablation can resume. The
results of autoencoders are the last evaluation of each run: results.json, a table, and curves of
all arms. Flows are compared by their samples, since the losses of the arms have different targets:
in one feature space for all, then one flow sampled by every method at several step counts and
decoded at several radii.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax import rules
from dinosae_jax.data import png
from dinosae_jax.eval.protocols import comparison, inputs
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.names import AUTOENCODER_ROLES
from dinosae_jax.report import comparison_tables, curves
from dinosae_jax.runtime import console, files, stopping
from dinosae_jax.train import stages
from dinosae_jax.weights import weight_source


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Runs every arm with every seed, then writes the comparison.

    Args:
      config: `base` (a training config), `arms` {name: {'path/to/field': value}}, `order` (names of
        the arms), `seeds`, and `metrics` (names of the evaluation that the table shows), or for
        flows what `configs/ablation_flow.py` has.
      folder: folder of the comparison.
    """
    of_flows = "flow" in config.base
    with stopping.StopRequest() as stop:
        if of_flows:
            inputs.pretrained_weights(config.weights)  # refused before anything is trained
            config = config.copy_and_resolve_references()
            config.base.init_from = train_autoencoder(config, folder, stop)
        for arm in config.order:
            for seed in config.seeds:
                stage = arm_config(config, arm, seed)
                stages.run_stage(stage, folder / arm / f"seed{seed}", stop)
        if of_flows:
            compare(config, folder, stop)
            return
    if jax.process_index() == 0:
        write_comparison(folder, tuple(config.order), tuple(config.seeds), tuple(config.metrics))


def arm_config(config: ml_collections.ConfigDict, arm: str, seed: int) -> ml_collections.ConfigDict:
    """Returns the base config with the changes of one arm; the value None removes a field.

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
    folder: epath.Path, arms: tuple[str, ...], seeds: tuple[int, ...], metrics: tuple[str, ...]
) -> str:
    """Writes results.json, table.md and curves.png from the runs' metrics, and prints the table.

    Returns:
      The table: one row per arm, mean and standard deviation of the last evaluations over seeds.
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


def _evaluations(path: epath.Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval/") for name in line)]


AFFINE_SPREAD = 0.5


def train_autoencoder(
    config: ml_collections.ConfigDict, folder: epath.Path, stop: stopping.StopRequest
) -> str:
    """Trains the autoencoder of all arms, unless that is done; returns its workdir.

    A random ViT ends in a LayerNorm whose initial affine part gives all tokens one norm, so that
    raw and projected latents would be equal. A trained ViT's does not, so the affine part is drawn.
    """
    start, workdir = folder / "random", folder / "autoencoder"
    if not (start / weight_source.EXPORT_FILE).exists():
        source = random_source(config.autoencoder.model.to_dict(), config.autoencoder.seed)
        norm = source.variables["vit"]["params"]["norm"]
        random = np.random.default_rng(config.autoencoder.seed)
        drawn = {
            "scale": np.exp(AFFINE_SPREAD * random.standard_normal(norm["scale"].shape)),
            "bias": AFFINE_SPREAD * random.standard_normal(norm["bias"].shape),
        }
        size = np.sqrt(np.mean(drawn["scale"] ** 2 + drawn["bias"] ** 2))  # tokens of unit variance
        norm |= {name: np.float32(value / size) for name, value in drawn.items()}
        weight_source.export(source, start, AUTOENCODER_ROLES)
    stage = config.autoencoder.copy_and_resolve_references()
    stage.name, stage.init_from = "autoencoder", str(start)
    stages.run_stage(stage, workdir, stop)
    return str(workdir)


def compare(
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
    autoencoder = Autoencoder.load(folder / "autoencoder", "float32", batch_size=config.samples)
    network = inputs.feature_network(config.weights, autoencoder.mesh, lambda: autoencoder)
    names = comparison_tables.titles(network)
    judge = comparison.Judge(config, network)
    measured = comparison.Scores(
        folder / "scores.json", comparison.recipe_of(config, network), judge
    )
    measured.add("real crops", lambda: judge.crops)
    scaled = judge.crops / np.float32(255)
    measured.add("reconstructed crops", lambda: png.as_picture(autoencoder.reconstruct(scaled)))
    for setting in comparison.settings(config):
        if stopped := stop.agreed():
            raise stopping.Interrupted(f"{config.name} stopped before {setting.key}", stopped)
        measured.add(
            setting.key, functools.partial(comparison.draw_samples, config, folder, setting)
        )
    text = "\n".join(
        [
            *comparison_tables.describe(config, network),
            "",
            *comparison_tables.tables(config, measured.scores, names),
        ]
    )
    if jax.process_index() == 0:
        files.write_text(folder / "tables.md", text + "\n")
        comparison_tables.write_pictures(config, folder, measured.scores, names["frechet"])
    console.report(text)
    return text
