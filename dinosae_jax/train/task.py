"""Arguments of the training loop: a task is what is trained, a run is where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import CheckpointManager

from dinosae_jax.data import loading
from dinosae_jax.runtime import stopping
from dinosae_jax.train import state as state_lib

State = state_lib.TrainState


class Task(NamedTuple):
    """A stage that is ready to run.

    Attributes:
      step: (state, batch on devices) -> state; compiled, donates the state.
      evaluate: state -> {'eval/...': float}, deterministic.
      batches: first step -> this process's training batches from there on.
      restore: manager -> state, the newest good checkpoint's or a new one.
      finish: state -> None, writes the pictures of the finished stage.
      record: what each checkpoint stores besides the state.
      metric_names: the names of `state.metrics`.
      flops_per_image: model FLOPs of one step per image, from `step_flops`.
    """

    step: Callable[[State, Mapping[str, jax.Array]], State]
    evaluate: Callable[[State], dict[str, float]]
    batches: Callable[[int], loading.Batches]
    restore: Callable[[CheckpointManager], State]
    finish: Callable[[State], None]
    record: dict[str, Any]
    metric_names: tuple[str, ...]
    flops_per_image: int


class Run(NamedTuple):
    """Where a task runs.

    Attributes:
      config: config of the stage, its dtype resolved.
      workdir: folder of the stage.
      mesh: the devices.
      manager: manager of the stage's checkpoints.
      stop: checked after each step.
    """

    config: Any
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    manager: CheckpointManager
    stop: stopping.StopRequest
