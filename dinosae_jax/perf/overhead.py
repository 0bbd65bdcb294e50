"""What a training run costs besides its steps: loader, progress lines, EMA, checkpoints.

The bare step, on one batch that stays on the device, and the training loop with the real loader
take turns in one process, so that a busy machine slows both; the median turn of each counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from dinosae_jax.data import loading
from dinosae_jax.runtime import files, precision, sharding, stopping
from dinosae_jax.train import autoencoder_task, loop, state
from dinosae_jax.train.task import Run, Task
from dinosae_jax.weights import checkpoint


def measure_overhead(config: ml_collections.ConfigDict, folder: epath.Path) -> dict[str, float]:
    """Times the loop of an autoencoder stage against its bare step.

    Args:
      config: stage, batch_per_device, repeats, steps (configs/bench.py).
      folder: a folder for this measurement only; its contents are deleted.

    Returns:
      Seconds of one bare step, one step of the loop (with loader and progress lines), one saved
      checkpoint and one update of the moving averages as a program of its own (more than it costs
      inside the step); 'overhead' is what all of them add to a step, as a fraction of the bare
      step, with one checkpoint per `stage.checkpoint.every` steps.
    """
    stage = precision.resolve_config(config.stage)
    stage.batch_size = config.batch_per_device * jax.device_count()
    mesh = sharding.make_mesh(stage.mesh.fsdp)
    files.path(folder).rmtree(missing_ok=True)
    folder.mkdir(parents=True)
    task = autoencoder_task.prepare(stage, folder, mesh)
    bare, looped = [], []
    with checkpoint.open_manager(folder, keep=1) as manager:
        current = task.restore(manager)
        batch = sharding.put_batch(next(task.batches(0)), mesh)
        current = task.step(current, batch)
        for _ in range(config.repeats):
            seconds, current = timed(_repeat, task.step, current, batch, config.steps)
            bare.append(seconds / config.steps)
            seconds, current = _loop(task, current, stage, config.steps, manager, folder, mesh)
            looped.append(seconds)
        current = task.step(current, batch)
        save, _ = timed(_save, manager, current, task.record)
    average = jax.jit(state.update_ema)
    decay = jnp.float32(0.99)
    average(current.ema, current.params, decay)
    ema = statistics.median(timed(average, current.ema, current.params, decay)[0] for _ in range(5))
    seconds_of = {
        "step_seconds": statistics.median(bare),
        "loop_step_seconds": statistics.median(looped),
        "checkpoint_seconds": save,
        "ema_seconds": ema,
    }
    added = seconds_of["loop_step_seconds"] - seconds_of["step_seconds"] + ema
    added += save / stage.checkpoint.every
    return {**seconds_of, "overhead": added / seconds_of["step_seconds"]}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until the result is ready, and the result."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started, result


def _repeat(step: Callable[..., Any], current: Any, batch: Any, count: int) -> Any:
    for _ in range(count):
        current = step(current, batch)
    return current


def _save(manager: Any, current: state.TrainState, record: dict[str, Any]) -> None:
    checkpoint.save(manager, current, record)
    checkpoint.wait(manager)


def _loop(
    task: Task,
    current: state.TrainState,
    stage: ml_collections.ConfigDict,
    steps: int,
    manager: Any,
    folder: epath.Path,
    mesh: jax.sharding.Mesh,
) -> tuple[float, state.TrainState]:
    """Seconds per step of the loop, and the state after it.

    The clock runs from the end of the first step, for which the loop waits, to the line of metrics
    after the last but one, for which it also waits; the checkpoint at the end is not included.
    """
    requests: list[float] = []

    def watched(batches: loading.Batches) -> Iterator[dict[str, Any]]:
        for batch in batches:
            requests.append(time.perf_counter())
            yield batch

    start = int(current.step)
    plan = stage.copy_and_resolve_references()
    plan.steps = start + steps + 2
    plan.log_every, plan.eval.every = start + steps + 1, plan.steps + 1
    watched_task = task._replace(
        evaluate=lambda _: {},
        restore=lambda _: current,
        batches=lambda step: watched(task.batches(step)),
    )
    run = Run(plan, folder, mesh, manager, stopping.StopRequest())
    after = loop.run(watched_task, run)
    return (requests[-1] - requests[1]) / steps, after
