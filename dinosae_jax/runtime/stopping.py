"""Stopping on request: SIGTERM, SIGHUP or Ctrl-C on any process stops all at one common place.

A job that has something to save enters a `StopRequest`, which notes signals, and asks `agreed` or
`check` between two batches of whatever it does. Outside of it Ctrl-C ends the program at once, with
one line (`runtime.terminal`): what is finished is on the disk by then.
"""

from __future__ import annotations

import collections
import functools
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax.runtime import sharding, terminal

Item = TypeVar("Item")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_entered: list[StopRequest] = []


class Interrupted(Exception):
    """A signal stopped the job; its work is saved and the same command resumes it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number
        self.by_keyboard = number == signal.SIGINT


class StopRequest:
    """Records SIGTERM, SIGHUP and SIGINT inside its `with` block; a second SIGINT ends at once.

    A job's whole run is one such block, so that no signal is lost between two stages. A SIGHUP that
    is ignored (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, lag: int = 0) -> int | None:
        """The signal for which every process stops here; None to continue.

        A single process reads its own flag. Several take the maximum of their flags over all
        devices, so every process must call this at the same points, and gets the same answer.

        Args:
          lag: the answer is that of the call `lag` calls ago. The maximum is then computed behind
            the steps that were dispatched before it, and the host does not wait for the last `lag`
            of them.
        """
        if jax.process_count() == 1:
            return self.signal
        self._asked.append(_largest(self.signal or 0))
        answer = 0
        while len(self._asked) > lag:
            answer = max(answer, int(self._asked.popleft()))
        return answer or None

    def _note(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            terminal.end()
        self.signal = number
        if number == signal.SIGINT:
            terminal.say(" stopping at the next step; Ctrl-C again ends at once\n")


def check(what: str) -> None:
    """Raises Interrupted after a signal, where a job has entered a `StopRequest`.

    A collective, like `StopRequest.agreed`.

    Args:
      what: was stopped, for the message.
    """
    if _entered and (number := _entered[-1].agreed()):
        raise Interrupted(f"{what} stopped", number)


def interruptible(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Hands items on; before each it looks, as `check` does, whether to stop."""
    for item in items:
        check(what)
        yield item


def _largest(flag: int) -> jax.Array:
    """The largest flag of all processes, int32 [], without waiting for it."""
    mesh = sharding.make_mesh()
    flags = np.full((jax.local_device_count(),), flag, np.int32)
    return _compiled_max(mesh)(sharding.put_batch({"flag": flags}, mesh)["flag"])


@functools.cache
def _compiled_max(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
