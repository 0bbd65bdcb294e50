"""Times of the flow: t=1 is noise, t=0 is data. Shift, training distribution, sampling grid."""

from __future__ import annotations

import math
from typing import TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr, ndtri

from dinosae_jax import names

Times = TypeVar("Times", np.ndarray, Array)

BASE_DIMENSION = 4096


def dimension_shift(tokens: int, width: int) -> float:
    """Returns RAE's time shift max(1, sqrt(n d / 4096)); 8 for 256 tokens of 1024 channels."""
    return max(1.0, math.sqrt(tokens * width / BASE_DIMENSION))


def default_shift(given: float, tokens: int, width: int) -> float:
    """Returns the time shift of a config, `dimension_shift` where it is 0."""
    return given or dimension_shift(tokens, width)


def shift_time(t: Times, shift: float) -> Times:
    """Moves times toward noise: s t / (1 + (s-1) t), in a form that leaves 0 and 1 exact."""
    return t / (t + (1 - t) / shift)


def time_grid(steps: int, shift: float = 1.0, end: float = 0.0) -> np.ndarray:
    """Returns the float64 times [steps+1] of `steps` updates, from exactly 1 down to `end`.

    RAE's grid ends at 0.001 (before the shift), its 50 points are 49 updates.

    Raises:
      ValueError: if `steps` is below 1 or `shift` is not positive.
    """
    if steps < 1:
        raise ValueError(f"a sampler makes at least 1 step; got steps={steps}; ask for 1 or more")
    _check_shift(shift)
    return shift_time(np.linspace(1.0, end, steps + 1), shift)


def training_times(
    uniforms: Array,
    distribution: str = "logit-normal",
    *,
    mu: float = 0.0,
    sigma: float = 1.0,
    shift: float = 1.0,
    max_time: float = 0.999,
) -> Array:
    """Maps uniform draws to training times by the inverse distribution function, then shift.

    Args:
      uniforms: [b] float32 in [0, 1), one draw per example.
      distribution: 'uniform' or 'logit-normal', the sigmoid of N(mu, sigma^2).
      mu: mean of the normal.
      sigma: standard deviation of the normal.
      shift: see `dimension_shift`.
      max_time: the distribution is truncated to [0, max_time] before the shift; 0.999 as in RAE,
        1 for no truncation.

    Returns:
      [b] times in [0, 1].

    Raises:
      ValueError: for an unknown distribution, or a parameter out of range.
    """
    if distribution not in get_args(names.TimeDistribution):
        raise ValueError(
            f"a time distribution is one of {', '.join(get_args(names.TimeDistribution))}; got "
            f"{distribution!r}; choose one of these"
        )
    if not 0 < max_time <= 1:
        raise ValueError(f"max_time must be in (0, 1]; got {max_time}; 0.999 as in RAE, 1 for none")
    if sigma <= 0:
        raise ValueError(f"sigma must be positive; got {sigma}; the usual value is 1")
    _check_shift(shift)
    if distribution == "uniform":
        return shift_time(uniforms * max_time, shift)
    mass = 1.0 if max_time == 1 else ndtr((math.log(max_time / (1 - max_time)) - mu) / sigma)
    return shift_time(jax.nn.sigmoid(mu + sigma * ndtri(uniforms * mass)), shift)


def draw_times(keys: Array, distribution: str = "logit-normal", **options: float) -> Array:
    """Draws a training time per example from its own key, [b] -> [b]; see `training_times`."""
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    return training_times(uniforms, distribution, **options)


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise ValueError(
            f"the time shift must be positive; got {shift}; 1 leaves times as they are"
        )
