"""AdamW with traced hyperparameters: stages that differ only in them share one compiled step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from dinosae_jax import names

Tree = Any


def hyperparameters(optimizer: Mapping[str, Any], steps: int) -> dict[str, jax.Array]:
    """The optimizer's hyperparameters as float32 scalars, an argument of the compiled step.

    Args:
      optimizer: fields of `config.optimizer_defaults`.
      steps: length of the run, where a decay ends.
    """
    schedule = get_args(names.Schedule).index(optimizer["schedule"])
    hyperparams = {**optimizer, "steps": steps, "schedule": schedule}
    return {name: jnp.float32(value) for name, value in hyperparams.items()}


def learning_rate(step: jax.Array, hyperparams: Mapping[str, jax.Array]) -> jax.Array:
    """Rate of the update made at `step` (0-based).

    Warm-up: base * (step + 1) / warmup_steps. Afterwards constant, or from `decay_start` (at
    least the warm-up's end) to the last step down to `final_learning_rate` along a half cosine
    or a line, as in RAE's schedules (`utils/optim_utils.py` there).

    Args:
      step: int32 [].
      hyperparams: from `hyperparameters`.

    Returns:
      float32 [].
    """
    position = step.astype(jnp.float32)
    base, warmup = hyperparams["learning_rate"], hyperparams["warmup_steps"]
    start = jnp.maximum(hyperparams["decay_start"], warmup)
    progress = jnp.clip(
        (position - start) / jnp.maximum(hyperparams["steps"] - start, 1.0), 0.0, 1.0
    )
    final = hyperparams["final_learning_rate"]
    cosine = final + (base - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    linear = base + (final - base) * progress
    rate = jnp.select(
        [hyperparams["schedule"] == 0, hyperparams["schedule"] == 1], [base, cosine], linear
    )
    ramp = base * (position + 1.0) / jnp.maximum(warmup, 1.0)
    return jnp.where(position < warmup, ramp, rate)


def init(params: Tree) -> Tree:
    """AdamW's state: the first and second moments and their count."""
    return optax.scale_by_adam().init(params)


def update(
    grads: Tree,
    opt: Tree,
    params: Tree,
    step: jax.Array,
    hyperparams: Mapping[str, jax.Array],
    grad_norm: jax.Array,
) -> tuple[Tree, Tree]:
    """One AdamW update, clipped by the global norm where `clip_norm` is above 0.

    Args:
      grads: like `params`.
      opt: from `init`.
      params: float32.
      step: int32 [], the 0-based step whose rate is used.
      hyperparams: from `hyperparameters`.
      grad_norm: global norm of `grads`, which the caller logs.

    Returns:
      (new parameters, new optimizer state).
    """
    clip = hyperparams["clip_norm"]
    shrink = jnp.where((clip > 0) & (grad_norm > clip), clip / jnp.maximum(grad_norm, 1e-12), 1.0)
    grads = jax.tree.map(lambda g: g * shrink, grads)
    # optax's transformations are pure functions of their hyperparameters, which may be traced.
    adam = optax.scale_by_adam(b1=hyperparams["b1"], b2=hyperparams["b2"], eps=hyperparams["eps"])  # type: ignore[arg-type]
    updates, opt = adam.update(grads, opt, params)
    rate = learning_rate(step, hyperparams)
    decay = hyperparams["weight_decay"]
    params = jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, updates)
    return params, opt
