"""What several processes tell each other on the host, so that all decide the same.

Everything here is a collective: every process has to call it at the same places, in the same order.
One process alone is answered by itself.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

Value = TypeVar("Value")
LONGEST_WAIT = 1800  # seconds for which processes wait for the last of them
SMALLEST_MESSAGE = 4096  # bytes; lengths are powers of two, so that few programs are compiled
_meetings = itertools.count()


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers.

    Args:
      value: what JSON takes; of any length on each process.
    """
    if jax.process_count() == 1:
        return [value]
    # A device's collective gives up after 30 s (gloo); a host that lists a million files is later.
    multihost.sync_global_processes(f"agreement {next(_meetings)}", timeout=LONGEST_WAIT)
    text = np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    size = max(SMALLEST_MESSAGE, 1 << (int(lengths.max()) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(text, (0, size - len(text))))
    rows = rows.reshape(len(lengths), size)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` returns on the first process, on every process; no other process calls it.

    Args:
      make: returns what JSON takes.

    Raises:
      OSError: on the others where the first could not read or write; on the first, its own error.
      ValueError: likewise, for every other error of the first.
    """
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            answer = {"value": make()}
        except Exception as error:
            failure, kind = error, "system" if isinstance(error, OSError) else "other"
            answer = {kind: str(error) or type(error).__name__}
    answer = gather(answer)[0]
    if failure:
        raise failure
    if "system" in answer:
        raise OSError(answer["system"])
    if "other" in answer:
        raise ValueError(answer["other"])
    return answer["value"]


def require_equal(what: str, facts: Mapping[str, Any]) -> None:
    """Ends every process where one has other facts than the first.

    Args:
      what: the facts in a word or two, for the message.
      facts: nested dicts of what JSON takes.

    Raises:
      ValueError: on all processes, with every fact that differs.
    """
    first, *others = [dict(_leaves(each)) for each in gather(dict(facts))]
    lines = [
        f"{name}: {first.get(name)!r} on process 0, {other.get(name)!r} on process {number}"
        for number, other in enumerate(others, start=1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if lines:
        raise ValueError(
            f"all processes must have the same {what}; got {'; '.join(lines[:5])}; start them all "
            "with the same command, code and files"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
