"""Writes report.html of a run: one file, no script, nothing loaded from elsewhere.

write_report(workdir) -> report.html, curves.png
and for a chain also   reconstructions.png, samples.png, metrics.jsonl of all its stages,
                       sphere.png of the last stage that has one
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from PIL import Image

from dinosae_jax.data import png
from dinosae_jax.report import curves, pictures
from dinosae_jax.report.run_files import Run, Stage, last_value, metric_names, read_run
from dinosae_jax.runtime import files

PAGE_WIDTH = 1120
KID = "eval/kid_encoder"
LARGEST_MAGNIFICATION = 2  # tiny runs have tiny pictures
SAMPLES = "samples of the flow, one class per row, behind a training image of it"
SPHERE = (
    "What the decoder makes of the first held-out image when only the norms of its tokens change, "
    "and when only their directions do: towards another image's, and at random."
)
STYLE = """
:root { --ink: #1f2933; --soft: #66727f; --line: #dfe4e8; --mark: #2f6690; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 24px 80px; max-width: 1168px; color: var(--ink);
  font: 16px/1.55 "Inter", "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 20px; }
h2 { font-size: 22px; margin: 56px 0 6px; padding-top: 20px; border-top: 2px solid var(--ink); }
h3 { font-size: 16px; margin: 30px 0 8px; }
p { margin: 6px 0; max-width: 110ch; }
.notes { border-left: 4px solid #c77d0a; background: #fdf6e7; padding: 10px 18px;
  margin: 0 0 22px; }
.notes p { max-width: none; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; margin: 10px 0 4px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 22px 6px 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-size: 13px; font-weight: 600; vertical-align: bottom;
  border-bottom-color: var(--ink); }
th:first-child, td:first-child { text-align: left; }
table.wide { width: 100%; }
table.wide th:nth-child(2), table.wide td:nth-child(2) { text-align: left; }
td:last-child, th:last-child { padding-right: 0; }
td strong { color: var(--mark); }
figure { margin: 16px 0; }
figure img { display: block; max-width: 100%; }
figcaption { margin-top: 8px; max-width: 90ch; }
details { margin: 10px 0; border-top: 1px solid var(--line); padding-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  background: #f5f7f8; padding: 14px 16px; overflow-x: auto; }
.columns { display: flex; flex-wrap: wrap; gap: 8px 64px; }
a { color: var(--mark); }
@media print { details { break-inside: avoid; } }
"""


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Writes report.html and curves.png from the files that a run has left so far.

    Args:
      workdir: folder of one stage, or of a chain (with chain.json). `run_files.Stage` lists the
        files that are read; missing files are left out. A chain also gets reconstructions.png,
        samples.png and metrics.jsonl, combined from its stages, and the last sphere.png.

    Returns:
      The path of report.html.

    Raises:
      ValueError: the workdir does not exist.
    """
    folder = files.path(workdir)
    run = read_run(folder)
    drawn = {stage.name: _stage_curves(stage) for stage in run.stages}
    if run.is_chain:
        _combine_curves(folder, drawn)
        rows = ": originals above, reconstructions below"
        _combine_pictures(folder, run.stages, "reconstructions.png", rows)
        _combine_pictures(
            folder,
            run.stages,
            "samples.png",
            f": {SAMPLES}",
        )
        drawn_spheres = [stage for stage in run.stages if stage.picture("sphere.png")]
        _combine_pictures(folder, drawn_spheres[-1:], "sphere.png", ": norms and directions")
        _combine_metrics(folder, run.stages)
    files.write_text(folder / "report.html", render(run, drawn))
    return folder / "report.html"


def render(run: Run, drawn: dict[str, bytes | None]) -> str:
    """The report of a run as one HTML document; `drawn` are the curves of each stage as PNG."""
    title = f"dinosae_jax &middot; {html.escape(run.name)}"
    body = [
        _notes(run.notes),
        f"<h1>{title}</h1>",
        _overview(run.stages),
        _convergence(run.stages),
        *(_stage(stage, drawn[stage.name], run.is_chain) for stage in run.stages if stage.started),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{''.join(part for part in body if part)}</body></html>\n"
    )


# ---------------------------------------------------------------------------------- the overview


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f'<div class="notes">{lines}</div>\n' if lines else ""


def _overview(stages: Sequence[Stage]) -> str:
    with_kid = any(last_value(stage.metrics, KID) is not None for stage in stages)
    header = ["stage", "state", "held-out PSNR", "16 px block means", "mean colour"]
    header += ["KID, encoder features"] if with_kid else []
    header += ["images/s", "time", "peak memory"]
    rows = [_overview_row(stage, with_kid) for stage in stages]
    return _table(header, rows, wide=True) + (
        '<p class="soft">PSNR in dB on strips of the photographs that training never sees. The '
        "two baselines need no model: every 16 &times; 16 block replaced by its mean, and every "
        "image by its mean colour.</p>\n"
    )


def _overview_row(stage: Stage, with_kid: bool) -> list[str]:
    psnr = last_value(stage.metrics, "eval/psnr")
    blocks, colour = (
        stage.baselines.get(f"{name}_psnr") for name in ("block_means", "mean_colour")
    )
    cells = [
        f'<a href="#{html.escape(stage.name)}">{html.escape(stage.name)}</a>',
        _state(stage),
        f"<strong>{psnr:.2f}</strong>" if psnr is not None else "",
        *(f"{value:.2f}" if value is not None else "" for value in (blocks, colour)),
    ]
    if with_kid:
        cells.append(_number(last_value(stage.metrics, KID)))
    speeds = [row["images_per_second"] for row in stage.timing if "images_per_second" in row]
    seconds = stage.done.get("seconds") or last_value(stage.timing, "seconds")
    memory = stage.done.get("peak_memory_bytes")
    return [
        *cells,
        f"{statistics.median(speeds):.1f}" if speeds else "",
        _duration(seconds) if seconds is not None else "",
        f"{memory / 2**30:.2f} GiB" if memory else "",
    ]


def _state(stage: Stage) -> str:
    if stage.done:
        return f"finished, {stage.last_step:,} steps"
    return f"at step {stage.last_step:,}" if stage.started else "not started"


def _convergence(stages: Sequence[Stage]) -> str:
    drawn = curves.convergence_png(stages)
    caption = (
        "Evaluations over training steps, stage after stage, with the last value of each. PSNR of "
        "held-out images; KID of a few samples against training images in the encoder's own "
        "feature space."
    )
    return "<h3>Convergence</h3>\n" + _figure(drawn, caption, PAGE_WIDTH) if drawn else ""


# ------------------------------------------------------------------------------------- one stage


def _stage(stage: Stage, drawn: bytes | None, in_chain: bool) -> str:
    name = html.escape(stage.name)
    config = "\n".join(f"{key} = {value}" for key, value in _flatten(stage.config))
    return "".join(
        [
            f'<h2 id="{name}">{name}</h2>\n' if in_chain else "",
            _picture(stage, "reconstructions.png", "Originals above, reconstructions below."),
            _picture(
                stage,
                "samples.png",
                f"{SAMPLES.capitalize()}.",
            ),
            _picture(stage, "sphere.png", SPHERE),
            _curves(drawn),
            _robustness(stage),
            '<div class="columns">',
            _values("Last evaluation", stage.metrics, "eval/"),
            _values("Last training step logged", stage.metrics, "train/"),
            _values("Speed", stage.timing, ""),
            "</div>",
            _details("Parameters", stage.parameters),
            _details("Configuration, resolved", config),
        ]
    )


def _picture(stage: Stage, name: str, caption: str) -> str:
    path = stage.picture(name)
    if path is None:
        return ""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        width = image.width
    shown = min(LARGEST_MAGNIFICATION * width, PAGE_WIDTH)
    psnr = last_value(stage.metrics, "eval/psnr")
    if name == "reconstructions.png" and psnr is not None:
        caption += f" {psnr:.2f} dB on held-out strips after {stage.last_step:,} steps."
    return _figure(path.read_bytes(), caption, shown)


def _curves(drawn: bytes | None) -> str:
    caption = "Metrics over training steps; thick lines are running means where points are many."
    return "<h3>Curves</h3>\n" + _figure(drawn, caption, PAGE_WIDTH) if drawn else ""


def _robustness(stage: Stage) -> str:
    if not stage.robustness:
        return ""
    caption = "PSNR of the decoded images when every latent token is rotated by an angle."
    drawn = curves.robustness_png(stage.robustness)
    return "<h3>Decoder robustness</h3>\n" + _figure(drawn, caption, PAGE_WIDTH // 2)


def _values(title: str, rows: list[dict[str, Any]], prefix: str) -> str:
    values = [(name, last_value(rows, name)) for name in metric_names(rows, prefix)]
    cells = [[html.escape(name.removeprefix(prefix)), _number(value)] for name, value in values]
    table = _table(["", "value"], cells) if cells else ""
    return f"<div><h3>{title}</h3>{table}</div>" if cells else ""


# -------------------------------------------------------------------- combined files of a chain


def _combine_pictures(folder: epath.Path, stages: Sequence[Stage], name: str, caption: str) -> None:
    paths = [(stage.name, stage.picture(name)) for stage in stages]
    blocks = [
        pictures.captioned(png.decode_png(path.read_bytes()), f"{stage}{caption}")
        for stage, path in paths
        if path is not None
    ]
    if blocks:
        png.write_png(folder / name, pictures.stack(blocks, gap=16))


def _stage_curves(stage: Stage) -> bytes | None:
    """The stage's curves.png, redrawn only where its data are newer: drawing takes a second."""
    path = stage.folder / "curves.png"
    sources = [stage.folder / name for name in ("metrics.jsonl", "baselines.json")]
    changed = max((files.modified(file) for file in sources if file.is_file()), default=0.0)
    if path.is_file() and files.modified(path) > changed:
        return path.read_bytes()
    drawn = curves.curves_png(stage)
    if drawn:
        path.write_bytes(drawn)
    return drawn


def _combine_curves(folder: epath.Path, drawn: dict[str, bytes | None]) -> None:
    panels = [
        pictures.captioned(png.decode_png(data), name, size=22)
        for name, data in drawn.items()
        if data
    ]
    if panels:
        png.write_png(folder / "curves.png", pictures.stack(panels))


def _combine_metrics(folder: epath.Path, stages: Sequence[Stage]) -> None:
    rows = [{"stage": stage.name, **row} for stage in stages for row in stage.metrics]
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------ HTML pieces


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], wide: bool = False) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{cell or '&ndash;'}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    attribute = ' class="wide"' if wide else ""
    return f"<table{attribute}><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>\n"


def _figure(png: bytes, caption: str, width: int) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img width="{width}" alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>\n'
    )


def _details(title: str, text: str) -> str:
    if not text.strip():
        return ""
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>\n"


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of a nested configuration as dotted names and JSON values."""
    if isinstance(value, dict) and (value or not path):
        for key, child in value.items():
            yield from _flatten(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    whole = float(value).is_integer() and abs(value) < 1e9
    return f"{int(value):,}" if whole else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
