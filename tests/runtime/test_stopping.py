"""Requests to stop: which signals, who looks at them, and what several processes agree on."""

import os
import signal

import pytest

from dinosae_jax.runtime import stopping


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signals_are_noted_and_seen_between_two_items(number):
    seen = []
    before = signal.getsignal(number)
    stopped = pytest.raises(stopping.Interrupted, match="counting stopped")
    with stopped as caught, stopping.StopRequest():
        for item in stopping.interruptible(range(5), "counting"):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), number)
    assert seen == [0, 1, 2]
    assert caught.value.by_keyboard == (number == signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nobody_asks_outside_of_a_request():
    stopping.check("nothing")
    assert list(stopping.interruptible(range(3), "nothing")) == [0, 1, 2]


def test_a_question_without_lag_hears_the_answers_before_it(monkeypatch):
    """After lagging questions of the loop, an evaluation must not get an old answer."""
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
    monkeypatch.setattr(stopping, "_largest", lambda flag: flag)
    stop = stopping.StopRequest()
    assert [stop.agreed(lag=2) for _ in range(3)] == [None, None, None]
    stop.signal = signal.SIGTERM
    assert stop.agreed() == signal.SIGTERM
    assert [stop.agreed(lag=2) for _ in range(3)] == [None, None, signal.SIGTERM]
