"""A training step as one compiled program on a mesh, whatever it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from dinosae_jax.runtime import jit, sharding
from dinosae_jax.train import state as state_lib

Tree = Any
State = state_lib.TrainState


@functools.lru_cache
def jit_step(
    train_step: Callable[..., State], spec: Any, mesh: jax.sharding.Mesh
) -> Callable[[State, Tree, Tree, Tree], State]:
    """Jit of a step; the state is donated and keeps its shardings.

    Args:
      train_step: (spec, state, frozen, batch, hyperparams) -> state.
      spec: static, hashable; stages that share it share the program.
      mesh: the devices.

    Returns:
      (state, frozen, batch, hyperparams) -> state.
    """

    def step(state: State, frozen: Tree, batch: Tree, hyperparams: Tree) -> State:
        products = jax.default_matmul_precision(spec.matmul_precision)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), products:
            new = train_step(spec, state, frozen, batch, hyperparams)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(state, mesh))

    here = mesh.devices.flat[0].platform == "cpu"  # and no slice that the planner compiles for
    return (jit.jit_often if here else jax.jit)(step, donate_argnums=0)
