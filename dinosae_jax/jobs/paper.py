"""Tables of the papers' results: the commands that should reproduce them, and their costs.

Costs are estimates from formulas alone; nothing is trained or compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import ml_collections
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax.runtime import console, files, hardware
from dinosae_jax.train import step_flops


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes both tables to workdir/paper.md.

    Args:
      config: config of `configs/paper.py`.
      folder: folder of the tables.

    Raises:
      ValueError: for a utilisation outside (0, 1].
    """
    text = tables(config)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "paper.md", text)
        console.report(text + f"\n{config.name}: wrote {folder / 'paper.md'}")


def tables(config: ml_collections.ConfigDict) -> str:
    """Markdown: each number with its run and measurement, then each run with command and hours.

    Raises:
      ValueError: for a utilisation outside (0, 1].
    """
    if not 0 < config.utilisation <= 1:
        raise ValueError(
            f"utilisation is a fraction of the peak in (0, 1]; got {config.utilisation}; 0.4 is "
            "what good training code reaches"
        )
    numbers = [
        (version, number, value, run, f"`{command}`")
        for version, number, value, run, command in config.numbers
    ]
    header = ("version", "number", "paper", "run", "command that measures it")
    runs = [_run_row(config, name) for name in config.chain]
    hours = [f"{name}, hours" for name in config.accelerators]
    return (
        _table(header, numbers) + "\n" + _table(("run", "epochs", "EFLOP", *hours, "command"), runs)
    )


def run_flops(config: ml_collections.ConfigDict) -> float:
    """Model FLOPs of all training steps of a run."""
    return float(step_flops.train_flops(config)) * config.batch_size * config.steps


def _run_row(config: ml_collections.ConfigDict, name: str) -> tuple[str, ...]:
    stage = config.stages[name]
    flops = run_flops(stage)
    epochs = stage.steps / config_lib.epochs(1, stage.batch_size)
    speeds = [hardware.KINDS[kind].peak_tflops for kind in config.accelerators.values()]
    hours = [flops / (config.utilisation * speed * 1e12) / 3600 for speed in speeds]
    return (
        name,
        f"{epochs:.0f}",
        f"{flops / 1e18:.1f}",
        *(f"{h:,.0f}" for h in hours),
        f"`{config.commands[name]}`",
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
