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
    """SIGTERM or Ctrl-C stopped the job; its work is saved and the same command resumes it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.by_keyboard = number == signal.SIGINT


class StopRequest:
    """Records SIGTERM and SIGINT inside its `with` block; a second SIGINT ends at once.

    A job's whole run is one such block, so that no signal is lost between two stages; it calls
    `agreed` wherever it can stop.
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
        if len(self._asked) <= lag:
            return None
        return int(self._asked.popleft()) or None

    def _note(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if number == signal.SIGINT:  # print is not reentrant, and the signal may interrupt a print
            os.write(2, b" stopping at the next step; Ctrl-C again ends at once\n")


def _largest(flag: int) -> jax.Array:
    """The largest flag of all processes, int32 [], without waiting for it."""
    mesh = sharding.make_mesh()
    flags = np.full((jax.local_device_count(),), flag, np.int32)
    return _compiled_max(mesh)(sharding.put_batch({"flag": flags}, mesh)["flag"])


@functools.cache
def _compiled_max(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
