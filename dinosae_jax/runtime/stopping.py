"""Stopping on request: SIGTERM or Ctrl-C on any process stops all of them at one common step."""

from __future__ import annotations

import collections
import functools
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax.runtime import sharding


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: what is done is saved and the same command goes on from it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.by_keyboard = number == signal.SIGINT


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered; a second SIGINT ends at once.

    A job enters one for its whole length, so that no signal is lost between two stages, and asks
    `agreed` wherever it could stop.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, lag: int = 0) -> int | None:
        """The signal for which every process stops here; None to go on.

        One process alone just looks at its flag. Several put theirs through a maximum over all
        devices, so every process has to ask at the same places and gets the same answer there.

        Args:
          lag: the answer is that to the question so many calls ago. The maximum is then computed
            behind the steps that were dispatched before it, and the host waits for none of the
            last `lag` of them.
        """
        if jax.process_count() == 1:
            return self.signal
        self._asked.append(_largest(self.signal or 0))
        if len(self._asked) <= lag:
            return None
        return int(self._asked.popleft()) or None

    def _note(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if number == signal.SIGINT:  # print is not allowed where a signal may have cut into one
            os.write(2, b" stopping at the next step; Ctrl-C again ends at once\n")


def _largest(flag: int) -> jax.Array:
    """The largest flag of all processes, int32 [], not waited for."""
    mesh = sharding.make_mesh()
    flags = np.full((jax.local_device_count(),), flag, np.int32)
    return _compiled_max(mesh)(sharding.put_batch({"flag": flags}, mesh)["flag"])


@functools.cache
def _compiled_max(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
