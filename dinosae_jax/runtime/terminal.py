"""Ctrl-C and the standard streams, from the start of the program: nothing slow is imported here."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

# What Ctrl-C still does before the program ends, as quickly as a signal's handler must be.
before_end: list[Callable[[], None]] = []


class LastingStream(io.TextIOBase):
    """A standard stream whose reader may go away: from then on its text is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def fileno(self) -> int:
        """The descriptor of the stream itself."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream itself."""
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        # What the stream still holds goes nowhere, or the interpreter would fail at its exit.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Makes standard output and error survive a closed pipe (`| head`), terminal or full disk."""
    sys.stdout = LastingStream(sys.stdout)  # type: ignore[assignment]
    sys.stderr = LastingStream(sys.stderr)  # type: ignore[assignment]


def quiet_libraries() -> None:
    """Drops the tracebacks that other libraries print of their own accord.

    One error in the background, a full disk, say, gives hundreds of lines from Orbax, asyncio and
    TensorStore's threads. It also reaches the main thread, where it becomes one line.
    """
    if os.environ.get("DINOSAE_TRACEBACK"):
        return
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_of_use)
    uncaught, in_thread = sys.excepthook, threading.excepthook

    def on_uncaught(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            uncaught(*error)

    def on_thread(arguments: Any) -> None:
        if getattr(arguments.exc_value, "errno", None) != errno.ENOSPC:
            in_thread(arguments)

    sys.excepthook, threading.excepthook = on_uncaught, on_thread


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a library's line says more than that a bucket is slower than a disk."""
    waited = str(record.msg).startswith("Waiting for previous save to complete took")
    return not record.exc_info and not waited


def end_on_keyboard() -> None:
    """Lets Ctrl-C end the program at once, with one line and exit code 130, from here on.

    An exception would be lost in a callback of another library, or come out of its depths with its
    traceback. Files are written whole or not at all, so nothing needs to be undone.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: end())


def end() -> NoReturn:
    """Ends the program for Ctrl-C, without a word from anything that is running."""
    say(" stopped; what was finished is kept\n")
    for last_act in before_end:
        with contextlib.suppress(Exception):
            last_act()
    os._exit(130)


def say(text: str) -> None:
    """Writes to standard error from a signal's handler, which may have cut into a print."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
