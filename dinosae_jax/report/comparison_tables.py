"""The tables and the figure of a comparison of flows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import png
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import comparison
from dinosae_jax.report import curves, pictures


def titles(network: features.FeatureNetwork) -> dict[str, str]:
    """Metric -> its name in tables and figures, which includes the feature space."""
    names = {metric: network.metrics[metric][0] for metric in comparison.METRICS}
    return {**names, "kernel": f"{names['kernel']} x 1000"}


def describe(config: ml_collections.ConfigDict, network: features.FeatureNetwork) -> list[str]:
    """The line above the tables: the feature space and the numbers of samples and steps."""
    tap = network.metrics["frechet"][1]
    return [
        f"Features: {network.name} ({tap}), {config.samples} samples against {config.reference} "
        f"crops of {config.base.data.source}; {config.base.steps} steps of "
        f"{config.base.batch_size}; mean ± deviation of {len(config.seeds)} seed(s)."
    ]


def tables(
    config: ml_collections.ConfigDict, scores: dict[str, comparison.Score], names: dict[str, str]
) -> list[str]:
    """The lines of three Markdown tables: arms, samplers by steps, decode radii.

    Args:
      config: config of the comparison.
      scores: scores of all its settings, by key.
      names: metric -> its name, from `titles`.
    """

    def cell(metric: str, setting: Callable[..., comparison.Setting], *given: Any) -> str:
        values = [scores[setting(config, *given, seed).key][metric] for seed in config.seeds]
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        return f"{np.mean(values):.3g}{spread}"

    lines = [f"| arm | {' | '.join(names.values())} |", "|---|---|---|"]
    for arm in config.order:
        cells = [cell(name, comparison.arm_setting, arm) for name in comparison.METRICS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for name in ("reconstructed crops", "real crops"):
        cells = [f"{scores[name][metric]:.3g}" for metric in comparison.METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = tuple(config.sweep.steps)
    counts = " | ".join(f"{count} steps" for count in steps)
    lines += ["", f"| sampler, {names['frechet']} | {counts} |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for sampler in config.sweep.samplers:
        cells = [cell("frechet", comparison.sampler_setting, sampler, count) for count in steps]
        lines.append(f"| {sampler} | {' | '.join(cells)} |")
    radii = tuple(config.sweep.radii)
    lines += ["", f"| decode radius | {' | '.join(f'x {factor:g}' for factor in radii)} |"]
    lines.append("|---" * (len(radii) + 1) + "|")
    for metric, title in names.items():
        cells = [cell(metric, comparison.radius_setting, factor) for factor in radii]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def write_pictures(
    config: ml_collections.ConfigDict,
    folder: epath.Path,
    scores: dict[str, comparison.Score],
    title: str,
) -> None:
    """Writes ablation_flow.png: curves of the sweeps, and below them samples of each arm by class.

    Args:
      config: config of the comparison.
      folder: where the arms are and the figure goes.
      scores: scores of all settings, by key.
      title: name of the Frechet distance.
    """
    sweep = config.sweep
    steps, radii = tuple(sweep.steps), tuple(sweep.radii)

    def runs(
        setting: Callable[[Any, int], comparison.Setting], places: tuple[float, ...]
    ) -> list[list]:
        return [
            [scores[setting(place, seed).key]["frechet"] for place in places]
            for seed in config.seeds
        ]

    panels = {
        f"{title} over steps": {
            name: (steps, runs(functools.partial(comparison.sampler_setting, config, name), steps))
            for name in sweep.samplers
        },
        f"{title} over decode radius / measured": {
            sweep.arm: (radii, runs(functools.partial(comparison.radius_setting, config), radii))
        },
    }
    plot = png.decode_png(curves.sweeps_png(panels))
    drawn = (folder / arm / f"seed{config.seeds[0]}" / "samples.png" for arm in config.order)
    grids = [
        pictures.captioned(png.decode_png(path.read_bytes()), arm)
        for arm, path in zip(config.order, drawn, strict=True)
    ]
    png.write_png(
        folder / "ablation_flow.png", pictures.stack([plot, pictures.side_by_side(grids)], gap=12)
    )
