"""Measures one H100 or H200: every row of `perf.card_rows` in a process of its own.

The workdir holds card.json (all rows so far), card.md (their table), rows/ (one file for each row)
and compiled/ (programs, which a later run reads). Programs of steps are compiled first, by several
processes at once, and measured then, by one process at a time. Run again, the job measures the rows
that are missing.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath

from dinosae_jax.eval.protocols import provenance
from dinosae_jax.perf import card_rows, cards
from dinosae_jax.runtime import files

FEWEST_SECONDS = 5.0  # with less time left no row is started
# Of a child that compiles beside others, and of one that measures alone.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
ALONE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Measures the rows that are missing, until the time is up.

    Args:
      config: config of `configs/bench.py:card`; `card` says which rows and how long.
      folder: of the results.

    Raises:
      ValueError: where this machine's device is no such card, or one of several.
    """
    deadline = time.monotonic() + config.card.seconds
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    machine = _measure("machine", config, folder, config.card.row_seconds)
    _check_card(config, machine)
    about = {
        "card": machine["lines"]["card"],
        "jax": machine["lines"]["jax"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": provenance.commit(),
    }
    _say(f"{about['card']}, jax {about['jax']}, commit {about['commit'][:9] or 'unknown'}")
    records = {} if config.card.again else _measured_before(config, folder, about)
    wanted = [name for name in config.card.rows if name not in records]
    _compile_ahead(wanted, config, folder, deadline)
    for name in wanted:
        left = deadline - time.monotonic()
        record: cards.Record = {"row": name, "status": "not run", "error": "the time was up"}
        if left > FEWEST_SECONDS:
            record = _measure(name, config, folder, min(left, config.card.row_seconds))
        records[name] = {**record, **about}
        _keep(folder, [records[row] for row in config.card.rows if row in records])
        _say(_describe(records[name]))
    if config.card.ledger:
        cards.enter(files.path(config.card.ledger), list(records.values()))


def _say(text: str) -> None:
    """Prints lines; `console` would ask jax for this process's number, which takes the card."""
    print(text, flush=True)


def _keep(folder: epath.Path, rows: list[cards.Record]) -> None:
    files.write_json(folder / "card.json", rows)
    files.write_text(folder / "card.md", cards.table(rows))


def _check_card(config: ml_collections.ConfigDict, machine: cards.Record) -> None:
    """Raises ValueError where this machine has not the one card that is to be measured."""
    found = machine.get("lines") or {"card": machine.get("error", ""), "devices": 0}
    if found["devices"] != 1 or config.card.device not in found["card"]:
        raise ValueError(
            f"configs/bench.py:card measures one {config.card.device or 'device'}; got "
            f"{found['devices']} x {found['card']}; show one card with CUDA_VISIBLE_DEVICES=0, or "
            "rehearse on a CPU with :card,tiny"
        )


def _measured_before(
    config: ml_collections.ConfigDict, folder: epath.Path, about: dict[str, Any]
) -> dict[str, cards.Record]:
    """The rows that this commit measured on this card, by name."""
    path = folder / "card.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    same = ("card", "jax", "commit")
    return {
        row["row"]: row
        for row in rows
        if row["status"] == "measured" and all(row[name] == about[name] for name in same)
    }


def _compile_ahead(
    rows: list[str], config: ml_collections.ConfigDict, folder: epath.Path, deadline: float
) -> None:
    """Compiles the steps into the cache, `compilers` at a time, in half of the time at most."""
    waiting = [name for name in rows if name in config.stages] if config.card.compilers > 1 else []
    stop = time.monotonic() + (deadline - time.monotonic()) / 2
    running: list[Any] = []
    while (waiting or running) and time.monotonic() < stop:
        while waiting and len(running) < config.card.compilers:
            running.append(_start(_compile, (waiting.pop(0), config, folder), SHARED))
        running = [child for child in running if child.is_alive()]
        time.sleep(0.1)
    for child in running:
        _end(child)


def _measure(
    name: str, config: ml_collections.ConfigDict, folder: epath.Path, seconds: float
) -> cards.Record:
    """One row by a process that may take so long: its lines, or what went wrong."""
    path = folder / "rows" / f"{name}.json"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    child = _start(_child, (name, config, folder), ALONE)
    child.join(seconds)
    late = child.is_alive()
    _end(child)
    took = round(time.monotonic() - started, 1)
    if path.exists():
        return {"row": name, "seconds": took, **json.loads(path.read_text())}
    error = f"took more than {seconds:.0f} s" if late else f"ended with code {child.exitcode}"
    return {"row": name, "seconds": took, "status": "failed", "error": error}


def _start(function: Callable[..., None], arguments: tuple[Any, ...], settings: Any) -> Any:
    """Starts a fresh interpreter, since a fork would share this one's threads."""
    before = dict(os.environ)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
        child.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return child


def _end(child: Any) -> None:
    """Ends a process that is still running, and waits for it."""
    if child.is_alive():
        child.kill()
    child.join()


def _child(name: str, config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """What a process does: measures one row and writes its file."""
    _keep_programs(folder)
    rows: dict[str, Callable[..., Any]] = {"machine": card_rows.machine, **card_rows.ROWS}
    try:
        measured = rows[name](config)
        lines = measured if name == "machine" else [line._asdict() for line in measured]
        result = {"status": "measured", "lines": lines}
    except Exception as error:
        traceback.print_exc()
        result = {"status": "failed", "error": card_rows.short(error)}
    files.write_json(folder / "rows" / f"{name}.json", result)


def _compile(name: str, config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    _keep_programs(folder)
    card_rows.compile_ahead(name, config)


def _keep_programs(folder: epath.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _describe(record: cards.Record) -> str:
    """A row as printed lines."""
    return cards.table([record]).split("\n", 2)[2].rstrip()
