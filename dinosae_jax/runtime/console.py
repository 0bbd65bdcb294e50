"""Printed lines of a run, from the first process only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax

REPORT_EVERY = 10.0  # seconds between two progress lines


def report(text: str) -> None:
    """Prints one line, from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def progress(name: str, batches: Iterator[Any], total: int, size: int) -> Iterator[Any]:
    """Yields the batches of `size` images, and prints images done and speed every 10 s."""
    started = shown = time.monotonic()
    for number, batch in enumerate(batches):
        now = time.monotonic()
        if number and now - shown > REPORT_EVERY:
            shown, done = now, min(number * size, total)
            report(f"{name} {done}/{total}  {done / (now - started):.1f} images/s")
        yield batch
