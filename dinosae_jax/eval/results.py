"""Results of an evaluation: each value with the recipe that made it, as JSON and as a table row."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dinosae_jax.runtime import files

DIGITS = {
    "top-1": 2,
    "top-5": 2,
    "PSNR": 2,
    "SSIM": 4,
    "LPIPS": 4,
    "IS": 1,
    "precision": 4,
    "recall": 4,
}
FEWEST_DIGITS = 3  # of every other metric, more where it is small


@dataclasses.dataclass(frozen=True)
class Result:
    """The value of one metric.

    Attributes:
      metric: its name, e.g. 'rFID', 'PSNR', 'gFD encoder'.
      value: finite.
      count: number of images it was measured on.
      recipe: how it was measured: features, resize, 8-bit conversion, convention.
      spread: its standard deviation over splits or subsets, where the metric has one.
      reference: what it was compared with, in words.
      reference_hash: of the reference's file, or the fingerprint of the data set.
      reference_count: number of images behind the reference.
    """

    metric: str
    value: float
    count: int
    recipe: Mapping[str, Any]
    spread: float | None = None
    reference: str = ""
    reference_hash: str = ""
    reference_count: int = 0


def write(folder: epath.Path, about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Writes results.json and results.md.

    Args:
      folder: where the files go.
      about: what all results share: model, checkpoint_step, sampler, steps, dtype, config_sha256.
      results: the results.

    Returns:
      The table of results.md.

    Raises:
      ValueError: a value that is not finite.
    """
    wrong = [result.metric for result in results if not math.isfinite(result.value)]
    if wrong:
        raise ValueError(
            f"results must be finite; got NaN or infinity for {', '.join(wrong)}; check weights "
            "and images"
        )
    rows = [dataclasses.asdict(result) for result in results]
    content = json.dumps({**about, "results": rows}, indent=2, sort_keys=True)
    text = table(about, results)
    for name, written in (("results.json", content), ("results.md", text)):
        files.write_text(folder / name, written + "\n")
    return text


def table(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """A markdown table of one row: what was measured, on how many images, and every value."""
    sampler = f"{about['sampler']} {about['steps']}" if about.get("sampler") else "-"
    cells = {
        "model": about.get("model") or "-",
        "step": "-" if about.get("checkpoint_step") is None else about["checkpoint_step"],
        "images": max(result.count for result in results),
        "sampler": sampler,
        **{result.metric: shown(result) for result in results},
        "recipe": about.get("features") or "-",
    }
    lines = [list(cells), ["---"] * len(cells), [str(cell) for cell in cells.values()]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(result: Result) -> str:
    """The value as papers print it, with its spread."""
    small = 0 < abs(result.value) < 0.1
    digits = FEWEST_DIGITS + (2 if small else 0)
    for name, theirs in DIGITS.items():
        if result.metric.split(" ")[0].startswith(name):
            digits = theirs
    text = f"{result.value:.{digits}f}"
    return text if result.spread is None else f"{text} ± {result.spread:.{digits}f}"
