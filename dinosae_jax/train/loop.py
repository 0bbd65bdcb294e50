"""The training loop: a `Task` is what is trained, a `Run` where.

At the start the state is restored or created and the batches are opened at `state.step`. Each
iteration: next batch, step, and at their intervals a line of metrics, a checkpoint, an evaluation.
The host waits for the device only where a line is written. An evaluation that was interrupted,
after the checkpoint of its step, is made when the run resumes, so that the lines are the same.
"""

from __future__ import annotations

import jax
import ml_collections
import numpy as np

from dinosae_jax.runtime import console, files, sharding, stopping, tracing
from dinosae_jax.train import metric_writer
from dinosae_jax.train import state as state_lib
from dinosae_jax.train.task import Run, State, Task
from dinosae_jax.weights import checkpoint

STOP_LAG = 2  # steps that a signal is known later on several processes, so that no host waits


def run(task: Task, run: Run) -> State:
    """Trains from the newest checkpoint, or from the start, to `config.steps`.

    Args:
      task: what is trained.
      run: where it is trained; its config has steps, batch_size, log_every, eval, checkpoint,
        skip_limit, profile_steps and name.

    Returns:
      The state after the last step, saved.

    Raises:
      stopping.Interrupted: after a signal, with everything saved.
      FloatingPointError: after `skip_limit` steps in a row that were not finite.
    """
    config, workdir = run.config, run.workdir
    state = task.restore(run.manager)
    start = int(state.step)
    batches = task.batches(start)
    writer = metric_writer.RunWriter(workdir, start, enabled=jax.process_index() == 0)
    progress = metric_writer.Progress(
        config.name, config.steps, start, config.batch_size, task.flops_per_image
    )
    trace = tracing.StepTrace(config.profile_steps, workdir)
    try:
        if start and _is_due(config, start) and not writer.has_evaluation(start):
            _evaluate(task, run, state, start, writer)
        if number := run.stop.agreed():
            raise stopping.Interrupted(f"{config.name} stopped before step {start + 1}", number)
        for step in range(start + 1, config.steps + 1):
            trace.before(step)
            batch = next(batches)
            placed = sharding.put_batch(batch, run.mesh)
            with jax.transfer_guard("disallow"):  # a step must not wait for the host in silence
                state = task.step(state, placed)
            trace.after(step, state.step)
            if step == start + 1:
                jax.block_until_ready(state.step)
                console.report(f"{config.name}: first step done, the rest runs at full speed")
                progress.restart_clock(step)
            stopped = run.stop.agreed(lag=STOP_LAG)
            if step % config.log_every == 0 or step == config.steps:
                state = _write_line(task, run, state, step, writer, progress, batch)
            if step % config.checkpoint.every == 0 or step == config.steps or stopped:
                checkpoint.save(run.manager, state, task.record, writer.publish)
            if stopped and step < config.steps:
                raise stopping.Interrupted(
                    f"{config.name} stopped at step {step} of {config.steps}", stopped
                )
            if _is_due(config, step):
                _evaluate(task, run, state, step, writer)
                progress.restart_clock(step)
        writer.publish()
        checkpoint.wait(run.manager)
    except stopping.Interrupted:
        checkpoint.wait(run.manager)
        raise
    finally:
        trace.close()
        writer.close()
    return state


def _is_due(config: ml_collections.ConfigDict, step: int) -> bool:
    return step % config.eval.every == 0 or step == config.steps


def _evaluate(
    task: Task, run: Run, state: State, step: int, writer: metric_writer.RunWriter
) -> None:
    """Writes an evaluation; where it is interrupted the state is saved."""
    config = run.config
    try:
        values = task.evaluate(state)
    except stopping.Interrupted as stop:
        checkpoint.save(run.manager, state, task.record, writer.publish)
        raise stopping.Interrupted(
            f"{config.name} stopped in its evaluation at step {step} of {config.steps}", stop.number
        ) from None
    writer.metrics(step, values)
    shown = " ".join(f"{n.split('/')[-1]} {v:.4g}" for n, v in values.items())
    console.report(f"{config.name} {step}/{config.steps}  held out: {shown}")


def _write_line(
    task: Task,
    run: Run,
    state: State,
    step: int,
    writer: metric_writer.RunWriter,
    progress: metric_writer.Progress,
    batch: dict[str, np.ndarray],
) -> State:
    """Writes the means since the last line, restarts them, and stops a run of skipped steps."""
    means = jax.device_get({name: mean.compute() for name, mean in state.metrics.items()})
    values = {f"train/{name}": float(value) for name, value in means.items()}
    values["train/skipped"] = int(state.skipped)
    writer.metrics(step, values)
    writer.timing(step, progress.line(step, values))
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row >= run.config.skip_limit:
        dump = run.workdir / f"bad_batch_{step}_{jax.process_index()}.npz"
        with files.publishing(dump) as partial:
            np.savez_compressed(partial, **batch)  # type: ignore[arg-type]
        raise FloatingPointError(
            f"a run stops after skip_limit={run.config.skip_limit} steps in a row with a "
            f"non-finite loss or gradient; got {in_a_row}; lower the learning rate or look at the "
            f"last batch in {dump}"
        )
    zeros = state_lib.zero_metrics(task.metric_names)
    return state.replace(metrics=sharding.replicate(zeros, run.mesh))
