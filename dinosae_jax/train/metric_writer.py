"""What a run writes during training: metrics.jsonl, timing.jsonl, TensorBoard events, progress.

metrics.jsonl holds only what the data and the seed determine, so that it is the same, byte for
byte, whether or not a run was interrupted; everything that depends on time is in timing.jsonl.

Objects in a bucket cannot grow. For a run that lives in one the files grow in a folder of this
machine, and `publish` writes those that have grown as whole objects: after every line of metrics,
and before every checkpoint, which is not saved without the lines before it.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer

from dinosae_jax.runtime import agreement, buckets, console, hardware

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class RunWriter:
    """Appends to the files of one stage; it starts by cutting them back to `start_step`."""

    def __init__(self, workdir: epath.Path, start_step: int, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        self.workdir = workdir
        self.temporary = _copy(workdir) if buckets.is_bucket(workdir) else None
        self.published: dict[str, int] = {}  # file -> its bytes in the bucket
        folder = pathlib.Path(self.temporary.name if self.temporary else workdir)
        self.metrics_path = folder / METRICS
        self.timing_path = folder / TIMING
        cut_back(self.metrics_path, start_step)
        cut_back(self.timing_path, start_step)
        self.events = event_file_writer.EventFileWriter(str(folder / "tensorboard"))
        # TensorBoard drops what an interrupted run wrote after this step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.events.add_event(
            event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=start)
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl, and the same scalars to TensorBoard."""
        if self.enabled:
            _append(self.metrics_path, {"step": step, **values})
            self._scalars(step, values)
            self._try_to_publish()

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has an evaluation of a step; a collective."""
        return agreement.from_first(lambda: _evaluated(self.metrics_path, step))

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of timing.jsonl, and the same scalars to TensorBoard under `time/`."""
        if self.enabled:
            _append(self.timing_path, {"step": step, **values})
            self._scalars(step, {f"time/{name}": value for name, value in values.items()})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
            ]
        )
        self.events.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def publish(self) -> None:
        """Writes the files that have grown to the bucket; raises OSError where that fails."""
        if not self.enabled or not self.temporary:
            return
        self.events.flush()
        folder = pathlib.Path(self.temporary.name)
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            name, length = path.relative_to(folder).as_posix(), path.stat().st_size
            if self.published.get(name) != length:
                buckets.upload(path, self.workdir / name)
                self.published[name] = length

    def _try_to_publish(self) -> None:
        try:
            self.publish()
        except OSError as error:
            console.report(f"The lines of metrics are kept for the next time: {error}")

    def close(self) -> None:
        """Flushes the event file."""
        if not self.enabled:
            return
        self._try_to_publish()
        self.events.close()
        if self.temporary:
            self.temporary.cleanup()


class Progress:
    """Speed and time left, measured between lines; compilation is not counted as speed."""

    def __init__(
        self, name: str, steps: int, start_step: int, batch_size: int, flops_per_image: int
    ):
        self.name, self.steps, self.batch_size = name, steps, batch_size
        self.flops_per_image = flops_per_image
        self.step, self.time = start_step, time.monotonic()
        self.rate = 0.0

    def restart_clock(self, step: int) -> None:
        """Leaves out the time since the last line: a compilation, an evaluation."""
        self.step, self.time = step, time.monotonic()

    def line(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Prints the progress line and returns the measured times.

        Returns:
          seconds_per_step, images_per_second, tflops_per_device, mfu (of known hardware) and
          peak_memory_gib since the last line; only the last where no step was timed.
        """
        elapsed = max(time.monotonic() - self.time, 1e-9)
        done = step - self.step
        self.restart_clock(step)
        shown = " ".join(
            f"{name.split('/')[-1]} {value:.4g}"
            for name, value in values.items()
            if name in ("train/loss", "train/psnr", "train/grad_norm") or name.startswith("eval/")
        )
        memory = {"peak_memory_gib": hardware.peak_memory() / 2**30}
        if not done:  # the step that compiled, or an evaluation came between
            console.report(f"{self.name} {step}/{self.steps}  {shown}")
            return memory
        seconds = elapsed / done
        rate = self.batch_size / seconds
        speed = hardware.utilisation(self.flops_per_image, rate, jax.devices())
        left = _clock(seconds * (self.steps - step))
        console.report(
            f"{self.name} {step}/{self.steps}  {shown}  "
            f"{rate:.0f} images/s  {describe_speed(speed)}  {left} left"
        )
        return {
            "seconds_per_step": seconds,
            "images_per_second": rate,
            **speed,
            **memory,
        }


def describe_speed(speed: Mapping[str, float]) -> str:
    """What `hardware.utilisation` found, for a progress line: '312 TFLOP/s/device (32% MFU)'."""
    tflops = speed["tflops_per_device"]
    shown = f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"
    used = f" ({speed['mfu']:.0%} MFU)" if "mfu" in speed else ""
    return f"{shown}/device{used}"


def _copy(workdir: epath.Path) -> tempfile.TemporaryDirectory[str]:
    """A folder of this machine with the lines that a bucket holds."""
    folder = tempfile.TemporaryDirectory(prefix="dinosae_jax_")
    for name in (METRICS, TIMING):
        if (workdir / name).exists():
            (pathlib.Path(folder.name) / name).write_bytes((workdir / name).read_bytes())
    return folder


def cut_back(path: pathlib.Path, last_step: int) -> None:
    """Drops the lines of a JSON-lines file that lie after `last_step`, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _evaluated(path: pathlib.Path, step: int) -> bool:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (json.loads(line) for line in lines)
    return any(row["step"] == step and any(n.startswith("eval/") for n in row) for row in rows)


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
