"""The training state: everything that a run needs to resume bitwise, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct

Tree = Any
Metrics = dict[str, clu_metrics.Average]

# Constants folded into the key of a step; each use of randomness has its own.
KEY_LATENT_SIGMA = 1
KEY_LATENT_NOISE = 2
KEY_AUGMENT_GENERATOR = 3
KEY_AUGMENT_REAL = 4
KEY_AUGMENT_FAKE = 5
KEY_FLOW_NOISE = 6
KEY_FLOW_TIME = 7
KEY_LABEL_DROP = 8


class TrainState(struct.PyTreeNode):
    """A pytree; every field is saved in every checkpoint.

    Attributes:
      step: int32 [], updates done, which is also the data position.
      params: trainable roles, role -> float32 parameters.
      extra: role -> mutable collections (batch statistics, spectral-norm vectors).
      opt: optimizer group ('generator', 'discriminator') -> optax state.
      ema: role -> exponential moving average of `params`.
      metrics: name -> running mean since the last line of metrics.jsonl.
      key: uint32 [2], the run's only key; a step uses fold_in(key, step).
      skipped: int32 [], steps in all that were not applied because something was not finite.
      skipped_in_a_row: int32 [], the same since the last applied step.
    """

    step: jax.Array
    params: dict[str, Tree]
    extra: dict[str, Tree]
    opt: dict[str, Tree]
    ema: dict[str, Tree]
    metrics: Metrics
    key: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def create(
    params: dict[str, Tree],
    extra: dict[str, Tree],
    opt: dict[str, Tree],
    metric_names: tuple[str, ...],
    seed: int,
    ema_roles: tuple[str, ...],
) -> TrainState:
    """A state at step 0, whose moving average starts as a copy of the parameters."""
    zero = jnp.zeros([], jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        extra=extra,
        opt=opt,
        ema=jax.tree.map(jnp.copy, {role: params[role] for role in ema_roles}),
        metrics=zero_metrics(metric_names),
        key=jax.random.PRNGKey(seed),
        skipped=zero,
        skipped_in_a_row=zero,
    )


def zero_metrics(names: tuple[str, ...]) -> Metrics:
    """Running means of no values."""
    return {name: clu_metrics.Average.empty() for name in names}


def add_metrics(metrics: Metrics, values: Mapping[str, jax.Array]) -> Metrics:
    """Adds one step's scalars to the running means; the names must be those of the state."""
    return {
        name: mean.merge(clu_metrics.Average.from_model_output(values[name]))
        for name, mean in metrics.items()
    }


def update_ema(ema: dict[str, Tree], params: dict[str, Tree], decay: jax.Array) -> dict[str, Tree]:
    """Returns decay * ema + (1 - decay) * params in float32, for the roles in `ema`."""
    current = {role: params[role] for role in ema}
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, current)


def select(condition: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where the scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def next_state(state: TrainState, updated: TrainState, finite: jax.Array) -> TrainState:
    """The state after a step: `updated` where everything was finite, else `state`, counted."""
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    return select(finite, updated, state).replace(
        step=state.step + 1,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )
