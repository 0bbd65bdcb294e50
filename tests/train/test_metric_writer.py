"""The progress line and what the clock measured."""

import jax
import pytest

from dinosae_jax.runtime import hardware
from dinosae_jax.train import metric_writer


def lines(monkeypatch, capsys, kind, flops):
    """(printed line, figures) of 4 steps of 16 images in 2 seconds on devices of a kind."""
    clock = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(metric_writer.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hardware, "find", lambda device: hardware.KINDS.get(kind))
    progress = metric_writer.Progress("stage", 100, 0, 16, flops)
    figures = progress.line(4, {"train/loss": 0.5})
    return capsys.readouterr().out.strip(), figures


def test_speed_and_use_of_known_hardware(monkeypatch, capsys):
    flops = 10**12 * jax.device_count()
    printed, figures = lines(monkeypatch, capsys, "TPU v4", flops)
    assert printed == "stage 4/100  loss 0.5  32 images/s  32 TFLOP/s/device (12% MFU)  0:48 left"
    assert figures["seconds_per_step"] == 0.5
    assert figures["tflops_per_device"] == pytest.approx(32.0)
    assert figures["mfu"] == pytest.approx(32 / 275)


def test_a_cpu_has_a_speed_but_no_peak(monkeypatch, capsys):
    flops = 10**9 * jax.device_count()
    printed, figures = lines(monkeypatch, capsys, "cpu", flops)
    assert "32 images/s  32 GFLOP/s/device  0:48 left" in printed
    assert figures["tflops_per_device"] == pytest.approx(0.032)
    assert "mfu" not in figures


def test_no_speed_is_invented_where_no_step_was_timed(monkeypatch, capsys):
    """The first step compiles and restarts the clock: a line right after it has timed nothing."""
    progress = metric_writer.Progress("stage", 100, 0, 16, 10**9)
    progress.restart_clock(1)
    assert set(progress.line(1, {"train/loss": 0.5})) == {"peak_memory_gib"}
    assert capsys.readouterr().out == "stage 1/100  loss 0.5\n"
