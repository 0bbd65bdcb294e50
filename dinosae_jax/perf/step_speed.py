"""Speed of training steps on synthetic batches with random parameters.

Groups of steps are timed as the training loop runs them (the host waits at the end of a group); the
result is the median group's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dinosae_jax.perf import programs
from dinosae_jax.runtime import hardware, jit, precision, sharding
from dinosae_jax.train import step_flops


class Ready(NamedTuple):
    """A compiled step: its stage, the devices, what was compiled, and in how many seconds."""

    stage: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    program: programs.Program
    compiled: Any
    seconds: float


def compile_step(config: ml_collections.ConfigDict, name: str) -> Ready:
    """Compiles the step of a stage for all devices, `batch_per_device` images each.

    Args:
      config: stages and batch_per_device (configs/bench.py).
      name: of the stage.
    """
    stage = precision.resolve_config(config.stages[name])
    stage.batch_size = config.batch_per_device[name] * jax.device_count() * stage.accumulation
    mesh = sharding.make_mesh(stage.mesh.fsdp)
    with jax.set_mesh(mesh):
        program = programs.build(stage, mesh)
        started = time.perf_counter()
        compiled = program.step.lower(*program.arguments).compile()
    return Ready(stage, mesh, program, compiled, time.perf_counter() - started)


def measure_step(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
    """Compiles and times one training step.

    Args:
      config: stages, batch_per_device, warmup, repeats and steps (configs/bench.py).
      name: name of the stage and of the row.

    Returns:
      batch_size, ms_per_step, images_per_second, peak_memory_bytes (per device, the compiler's
      plan), compile_seconds, flops_per_image, tflops_per_device and, where the peak of the device
      is known, mfu.
    """
    ready = compile_step(config, name)
    stage, seconds = ready.stage, time_step(ready, config)
    rate = stage.batch_size / seconds
    flops = step_flops.train_flops(stage)
    return {
        "batch_size": stage.batch_size,
        "ms_per_step": 1e3 * seconds,
        "images_per_second": rate,
        "peak_memory_bytes": programs.memory(ready.compiled)["peak"],
        "compile_seconds": ready.seconds,
        "flops_per_image": flops,
        **hardware.utilisation(flops, rate, list(ready.mesh.devices.flat)),
    }


def synthetic(program: programs.Program, seed: int) -> tuple[Any, tuple[Any, ...]]:
    """A random state, and the step's other arguments: frozen roles, batch, hyperparameters."""
    state, frozen, batch, hyperparams = (
        jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in program.arguments
    )
    make = jit.jit_once(program.make, out_shardings=(state, frozen))
    made, fixed = make(jax.random.PRNGKey(seed))
    random = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:  # labels stay below any number of classes
        return random.integers(0, 256 if leaf.ndim > 1 else 2, leaf.shape).astype(leaf.dtype)

    drawn = jax.device_put(jax.tree.map(draw, program.arguments[2]), batch)
    return made, (fixed, drawn, jax.device_put(program.hyperparams(), hyperparams))


def time_step(ready: Ready, config: ml_collections.ConfigDict) -> float:
    """Seconds per step, the median over `repeats` groups of `steps`, after `warmup` steps."""
    with jax.set_mesh(ready.mesh):
        state, others = synthetic(ready.program, ready.stage.seed)
        for _ in range(config.warmup):
            state = ready.compiled(state, *others)
        jax.block_until_ready(state)
        groups = []
        for _ in range(config.repeats):
            started = time.perf_counter()
            for _ in range(config.steps):
                state = ready.compiled(state, *others)
            jax.block_until_ready(state)
            groups.append((time.perf_counter() - started) / config.steps)
    return statistics.median(groups)


def call_seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def describe(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    used = f", {row['mfu']:.1%} of peak" if "mfu" in row else ""
    return (
        f"{name}: {row['images_per_second']:.1f} images/s, {row['ms_per_step']:.1f} ms/step at "
        f"batch {row['batch_size']}, {row['peak_memory_bytes'] / 2**30:.3f} GiB per device, "
        f"{row['tflops_per_device']:.4g} TFLOP/s per device{used} "
        f"(compiled in {row['compile_seconds']:.1f} s)"
    )
