"""Learning curves of a run as PNG: one panel per metric, with training and evaluation."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinosae_jax.report.run_files import Row, Stage, metric_names, series

Runs = Sequence[Sequence[Row]]
COLUMNS = 4
DPI = 130
PANEL_INCHES = (2.85, 2.0)
COLOURS = {"train": "#2f6690", "eval": "#d1495b"}
BASELINES = {"block_means_psnr": "16 px block means", "mean_colour_psnr": "mean colour"}
FIRST = ("loss", "psnr", "kid_encoder")  # the panels to look at first
CONVERGENCE = {
    "eval/psnr": "held-out PSNR (dB)",
    "eval/kid_encoder": "KID of samples, encoder features",
}
GREY = "#7d7d7d"
NICE = [1, 2, 2.5, 5, 10]  # steps between ticks


def curves_png(stage: Stage) -> bytes | None:
    """Draws the metrics of a stage, each in a panel of its own.

    Returns:
      A PNG 1482 pixels wide (130 per inch), or None where there is nothing to draw.
    """
    names = panel_names(stage.metrics)
    if not names:
        return None
    rows = math.ceil(len(names) / COLUMNS)
    width, height = COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]
    figure = Figure((width, height), dpi=DPI)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    left, bottom, top = (
        inches / size for inches, size in ((0.45, width), (0.25, height), (0.3, height))
    )
    figure.subplots_adjust(left, bottom, 1 - left / 6, 1 - top, wspace=0.25, hspace=0.38)
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, stage, name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return _png(figure)


def convergence_png(stages: Sequence[Stage]) -> bytes | None:
    """Draws the held-out PSNR and the KID of a whole run, its stages one after the other.

    Each stage has its own colour; its steps count from the last step of the stage before it.

    Args:
      stages: in their order, finished or not.

    Returns:
      A PNG, or None where no stage has been evaluated.
    """
    shown = [
        (name, label, [stage for stage in stages if series(stage.metrics, name)[1]])
        for name, label in CONVERGENCE.items()
    ]
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        return None
    widths = [max(len(measured), 2) for _, _, measured in shown]
    figure = Figure((PANEL_INCHES[0] * COLUMNS, 2.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths).ravel()
    for axes, (name, label, measured) in zip(panels, shown, strict=True):
        _draw_convergence(axes, measured, name)
        axes.set_title(label, loc="left", fontsize=9)
        _tidy(axes)
    return _png(figure)


def robustness_png(rows: list[Row]) -> bytes:
    """Draws PSNR over the angle by which every token was rotated before decoding."""
    figure = Figure((5.7, 2.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    angles, values = ([row[name] for row in rows] for name in ("angle_degrees", "psnr"))
    axes.plot(angles, values, color=COLOURS["eval"], marker="o", markersize=3, linewidth=1.5)
    axes.set_xlabel("angle between token and turned token (degrees)", fontsize=8)
    axes.set_ylabel("PSNR (dB)", fontsize=8)
    _tidy(axes)
    return _png(figure)


def write_comparison(path: epath.Path, series: Mapping[str, Runs], names: Sequence[str]) -> None:
    """Draws a comparison: one panel per metric, one colour per arm, one thin line per seed.

    Args:
      path: where the PNG goes.
      series: arm -> runs -> rows {"step": int, metric: float}, all runs with the same steps.
      names: metrics of the rows, one panel each.
    """
    size = (COLUMNS * PANEL_INCHES[0] / 1.5, 2.6 * math.ceil(len(names) / 2))
    figure = Figure(size, dpi=DPI, layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / 2), 2, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for colour, (arm, runs) in enumerate(series.items()):
            steps = [row["step"] for row in runs[0]]
            values = np.array([[row[name] for row in rows] for rows in runs])
            axes.plot(steps, values.T, color=f"C{colour}", linewidth=0.6, alpha=0.5)
            axes.plot(steps, values.mean(axis=0), color=f"C{colour}", linewidth=1.8, label=arm)
        axes.set_title(name.removeprefix("eval/"), loc="left", fontsize=9)
        _tidy(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=7, frameon=False)
    path.write_bytes(_png(figure))


def sweeps_png(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
) -> bytes:
    """Draws values over a setting: one panel per title, one colour per name, one dot per seed.

    A line joins the means over the seeds.

    Args:
      panels: title -> name -> (settings [k], values [s, k] of s seeds).
    """
    figure = Figure((COLUMNS * PANEL_INCHES[0], 2.8), dpi=DPI, layout="constrained")
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False).ravel(), panels.items(), strict=True
    ):
        for colour, (name, (settings, values)) in enumerate(names.items()):
            by_seed = np.asarray(values)
            axes.plot(settings, by_seed.T, ".", color=f"C{colour}", markersize=3, alpha=0.5)
            axes.plot(settings, by_seed.mean(axis=0), color=f"C{colour}", linewidth=1.5, label=name)
        drawn = np.concatenate([np.ravel(values) for _, values in names.values()])
        if drawn.min() > 0 and drawn.max() > 10 * drawn.min():
            axes.set_yscale("log", subs=(2, 5))
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xscale("log", subs=())
        axes.set_xticks(list(next(iter(names.values()))[0]), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.tick_params(labelsize=7, which="both")
    return _png(figure)


def panel_names(rows: list[Row]) -> list[str]:
    """Metric names without their train/ or eval/ prefix, those of `FIRST` first."""
    names = {name.removeprefix("train/").removeprefix("eval/"): None for name in metric_names(rows)}
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _draw_convergence(axes: Axes, stages: Sequence[Stage], name: str) -> None:
    before, last = 0, None
    for number, stage in enumerate(stages):
        steps, values = series(stage.metrics, name)
        moved = [before + step for step in steps]
        if last is not None:  # a short stage has one evaluation: also draw the line to it
            axes.plot([last[0], moved[0]], [last[1], values[0]], color=GREY, linewidth=0.8)
            axes.axvline(before, color=GREY, linewidth=0.5, linestyle=":")
        label = f"{stage.name} {values[-1]:.4g}"
        axes.plot(moved, values, color=f"C{number}", lw=1.4, marker="o", ms=2.5, label=label)
        before, last = before + stage.last_step, (moved[-1], values[-1])
    if name == "eval/psnr":
        _draw_baselines(axes, stages[0])
    axes.set_xlabel("training steps", fontsize=8)
    axes.margins(y=0.15)
    axes.legend(fontsize=7, framealpha=0.7, edgecolor="none")


def _draw_panel(axes: Axes, stage: Stage, name: str) -> None:
    drawn: list[float] = []
    for prefix in ("train", "eval"):
        steps, values = series(stage.metrics, f"{prefix}/{name}")
        if values:
            _draw_series(axes, steps, values, prefix)
            drawn += values
    if not drawn:
        steps, drawn = series(stage.metrics, name)  # a metric outside the two families
        _draw_series(axes, steps, drawn, "train")
    if name == "psnr":
        _draw_baselines(axes, stage)
    if drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
    axes.set_title(name, loc="left", fontsize=9, y=1.0)  # a fixed height is faster: no measuring
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=6.5, framealpha=0.7, edgecolor="none", borderpad=0.1)
    _tidy(axes)


def _draw_baselines(axes: Axes, stage: Stage) -> None:
    across = axes.get_yaxis_transform()  # x from 0 to 1, y in dB
    for key, label in BASELINES.items():
        if key in stage.baselines:
            level = stage.baselines[key]
            axes.axhline(level, linestyle="--", color=GREY, linewidth=0.8)
            axes.text(
                0.99,
                level,
                label,
                color=GREY,
                fontsize=6,
                ha="right",
                va="bottom",
                transform=across,
            )


def _draw_series(axes: Axes, steps: list[int], values: list[float], prefix: str) -> None:
    colour, marker = COLOURS[prefix], "o" if len(values) < 20 else None
    label = {"train": "training", "eval": "held out"}[prefix]
    if len(values) < 100:
        axes.plot(steps, values, color=colour, linewidth=1.3, marker=marker, ms=2.5, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    width = len(values) // 40 | 1
    smooth = np.convolve(values, np.full(width, 1.0 / width), "valid")
    axes.plot(steps[width // 2 :][: len(smooth)], smooth, color=colour, lw=1.4, label=label)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.tick_params(labelsize=7, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=NICE))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=NICE))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()
