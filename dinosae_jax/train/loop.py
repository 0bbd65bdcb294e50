"""The one training loop. What is trained is a `Task`: a step, an evaluation, what they are called.

Order at the start of a run: the caller restores or creates the state, opens the batches at
`state.step` and calls `run`. Each turn: next batch, step, and at their intervals a metrics line,
an evaluation, a checkpoint. The host waits for the device only where a line is written.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from dinosae_jax.runtime import console, sharding, stopping, tracing
from dinosae_jax.train import metric_writer
from dinosae_jax.train import state as state_lib
from dinosae_jax.weights import checkpoint

Batch = dict[str, np.ndarray]
STOP_LAG = 2  # steps that a signal is known later on several processes, so that no host waits


class Task(NamedTuple):
    """What the loop needs to know of a stage.

    Attributes:
      step: (state, batch on devices) -> state; compiled, donates the state.
      evaluate: state -> {'eval/...': float}, deterministic.
      metric_names: the names of `state.metrics`.
      flops_per_image: of the model in one step, by our own sum.
    """

    step: Callable[[state_lib.TrainState, Mapping[str, jax.Array]], state_lib.TrainState]
    evaluate: Callable[[state_lib.TrainState], dict[str, float]]
    metric_names: tuple[str, ...]
    flops_per_image: int


def run(
    task: Task,
    state: state_lib.TrainState,
    batches: Iterator[Batch],
    config: Any,
    workdir: pathlib.Path,
    manager: CheckpointManager,
    record: dict[str, Any],
    mesh: jax.sharding.Mesh,
    stop: stopping.StopRequest,
) -> state_lib.TrainState:
    """Trains from `state.step` to `config.steps`.

    Args:
      task: the stage.
      state: on the mesh; donated.
      batches: this process's rows of the global batches, from `state.step` on.
      config: steps, batch_size, log_every, eval, checkpoint, skip_limit, profile_steps, name.
      workdir: of this stage.
      manager: of its checkpoints.
      record: what every checkpoint carries beside the state.
      mesh: the devices.
      stop: asked after each step.

    Returns:
      The state after the last step, saved.

    Raises:
      stopping.Interrupted: after a signal, with everything saved.
      FloatingPointError: after `skip_limit` steps in a row that were not finite.
    """
    start = int(state.step)
    writer = metric_writer.RunWriter(workdir, start, enabled=jax.process_index() == 0)
    progress = metric_writer.Progress(
        config.name, config.steps, start, config.batch_size, task.flops_per_image
    )
    trace = tracing.StepTrace(config.profile_steps, workdir)
    try:
        for step in range(start + 1, config.steps + 1):
            trace.before(step)
            batch = next(batches)
            state = task.step(state, sharding.put_batch(batch, mesh))
            trace.after(step, state.step)
            if step == start + 1:
                jax.block_until_ready(state.step)
                console.report(f"{config.name}: first step done, the rest runs at full speed")
                progress.restart_clock(step)
            stopped = stop.agreed(lag=STOP_LAG)
            if step % config.log_every == 0 or step == config.steps:
                state = _write_line(task, state, step, writer, progress, config, workdir, batch)
            if step % config.eval.every == 0 or step == config.steps:
                values = task.evaluate(state)
                writer.metrics(step, values)
                shown = " ".join(f"{n.split('/')[-1]} {v:.4g}" for n, v in values.items())
                console.report(f"{config.name} {step}/{config.steps}  held out: {shown}")
                progress.restart_clock(step)
            if step % config.checkpoint.every == 0 or step == config.steps or stopped:
                checkpoint.save(manager, state, record)
            if stopped and step < config.steps:
                checkpoint.wait(manager)
                raise stopping.Interrupted(
                    f"{config.name} stopped at step {step} of {config.steps}", stopped
                )
        checkpoint.wait(manager)
    finally:
        trace.close()
        writer.close()
    return state


def _write_line(
    task: Task,
    state: state_lib.TrainState,
    step: int,
    writer: metric_writer.RunWriter,
    progress: metric_writer.Progress,
    config: Any,
    workdir: pathlib.Path,
    batch: Batch,
) -> state_lib.TrainState:
    """Writes the means since the last line, restarts them, and stops a run that cannot go on."""
    means = jax.device_get({name: mean.compute() for name, mean in state.metrics.items()})
    values = {f"train/{name}": float(value) for name, value in means.items()}
    values["train/skipped"] = int(state.skipped)
    writer.metrics(step, values)
    writer.timing(step, progress.line(step, values))
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row >= config.skip_limit:
        dump = workdir / f"bad_batch_{step}_{jax.process_index()}.npz"
        np.savez_compressed(dump, **batch)  # type: ignore[arg-type]
        raise FloatingPointError(
            f"{in_a_row} steps in a row had a non-finite loss or gradient (skip_limit="
            f"{config.skip_limit}); the last batch is in {dump}; lower the learning rate or look "
            "at that batch"
        )
    zeros = state_lib.zero_metrics(task.metric_names)
    return state.replace(metrics=sharding.replicate(zeros, _mesh_of(state)))


def _mesh_of(state: state_lib.TrainState) -> jax.sharding.Mesh:
    return state.step.sharding.mesh  # type: ignore[attr-defined]
