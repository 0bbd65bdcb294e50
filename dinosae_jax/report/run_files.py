"""Reads the files of a run's workdir, finished or not; missing files read as empty."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from etils import epath

from dinosae_jax.runtime import files

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The files of one stage.

    Attributes:
      name: folder name within a chain, or the workdir's own name.
      folder: where the files are.
      config: config.json, the resolved configuration.
      metrics: lines of metrics.jsonl, {"step": int, name: float, ...}.
      timing: lines of timing.jsonl, {"step", "seconds" (since the stage began),
        "images_per_second", ...}.
      parameters: parameters.txt, a table as text.
      notes: notes.json, sentences for the top of the report.
      baselines: baselines.json, {"block_means_psnr", "mean_colour_psnr"} in dB.
      robustness: robustness.json, rows {"angle_degrees", "psnr"}.
      done: DONE, {"step", "seconds", "peak_memory_bytes"}; empty until the stage has finished.
    """

    name: str
    folder: epath.Path
    config: Row
    metrics: list[Row]
    timing: list[Row]
    parameters: str
    notes: list[str]
    baselines: Row
    robustness: list[Row]
    done: Row

    @property
    def started(self) -> bool:
        """Whether the stage has written anything to report."""
        return bool(self.metrics or self.timing or self.done)

    @property
    def last_step(self) -> int:
        """The last step in any file."""
        return max(row.get("step", 0) for row in [*self.metrics, *self.timing, self.done])

    def picture(self, name: str) -> epath.Path | None:
        """The path of a picture of that file name, or None where it does not exist."""
        path = self.folder / name
        return path if path.is_file() else None


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir: one stage, or a chain of stages in order."""

    name: str
    stages: list[Stage]
    notes: list[str]
    is_chain: bool


def read_run(workdir: epath.Path) -> Run:
    """Reads a stage's or a chain's workdir.

    Raises:
      ValueError: the workdir does not exist.
    """
    if not workdir.is_dir():
        raise ValueError(
            f"a report needs the workdir of a run; got {workdir}, which does not exist; check the "
            "path"
        )
    name = files.absolute(workdir).name
    chain = _json(workdir / "chain.json", {})
    if not chain:
        stage = read_stage(workdir)
        return Run(name, [stage], stage.notes, is_chain=False)
    stages = [read_stage(workdir / stage) for stage in chain["stages"]]
    return Run(name, stages, _merge_notes(_json(workdir / "notes.json", []), stages), is_chain=True)


def read_stage(folder: epath.Path) -> Stage:
    """Reads the files of one stage; files that do not exist yet read as empty."""
    parameters = folder / "parameters.txt"
    return Stage(
        name=files.absolute(folder).name,
        folder=folder,
        config=_json(folder / "config.json", {}),
        metrics=_json_lines(folder / "metrics.jsonl"),
        timing=_json_lines(folder / "timing.jsonl"),
        parameters=parameters.read_text() if parameters.is_file() else "",
        notes=_json(folder / "notes.json", []),
        baselines=_json(folder / "baselines.json", {}),
        robustness=_json(folder / "robustness.json", []),
        done=_json(folder / "DONE", {}),
    )


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps and finite values of one metric."""
    points = [(row["step"], row.get(name)) for row in rows]
    finite = [(s, v) for s, v in points if isinstance(v, int | float) and math.isfinite(v)]
    return [step for step, _ in finite], [float(value) for _, value in finite]


def last_value(rows: list[Row], name: str) -> float | None:
    """The newest finite value of a metric, or None."""
    values = series(rows, name)[1]
    return values[-1] if values else None


def metric_names(rows: list[Row], prefix: str = "") -> list[str]:
    """The names of the numeric metrics that begin with `prefix`, in order of appearance."""
    names = {
        name: None
        for row in rows
        for name, value in row.items()
        if name != "step" and name.startswith(prefix) and isinstance(value, int | float)
    }
    return list(names)


def _merge_notes(notes: list[str], stages: list[Stage]) -> list[str]:
    """The chain's own notes, then each further note of a stage with the stages that state it."""
    origins: dict[str, list[str]] = {}
    for stage in stages:
        for note in stage.notes:
            if note not in notes:
                origins.setdefault(note, []).append(stage.name)
    return [
        *notes,
        *(
            note if len(names) == len(stages) else f"{', '.join(names)}: {note}"
            for note, names in origins.items()
        ),
    ]


def _json(path: epath.Path, default: Any) -> Any:
    return json.loads(path.read_text() or "null") or default if path.is_file() else default


def _json_lines(path: epath.Path) -> list[Row]:
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # half a line of a run that was killed
            continue
    return rows
