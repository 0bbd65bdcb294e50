"""Guidance: velocity functions for the samplers, combined from tangent vectors at the same point.

A network is a function apply(x [b, n, d], t [b], labels [b] int32) -> velocity [b, n, d], with its
parameters bound. Velocities are guided where lo <= t <= hi and are the labelled network's own
elsewhere, as in `forward_with_cfg` and `forward_with_autoguidance` of RAE's DDT.py.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinosae_jax.flow import sphere

Network = Callable[[Array, Array, Array], Array]
Velocity = Callable[[Array, ArrayLike], Array]
Tangent = Callable[[Array, Array], Array]


def conditional(apply: Network, labels: Array) -> Velocity:
    """Returns the unguided velocity (x, t scalar or [b]) -> [b, n, d] of `labels` [b]."""
    return lambda x, t: apply(x, _per_example(t, x), labels).astype(x.dtype)


def classifier_free(
    apply: Network,
    labels: Array,
    null_label: int | None,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    tangent: Tangent = sphere.tangent,
) -> Velocity:
    """Returns u + scale (c - u) from one network call on 2b examples: c with labels, u without.

    Args:
      apply: the network.
      labels: [b] int32.
      null_label: the label that means "none"; None if the model was trained without one.
      scale: 1 is no guidance.
      interval: (lo, hi), the times that are guided, both ends included.
      tangent: projection of a velocity at x; a Euclidean path passes its own.

    Raises:
      ValueError: without a null label, or for an interval that is not 0 <= lo <= hi <= 1.
    """
    if null_label is None:
        raise ValueError(
            "classifier-free guidance needs a null label; got null_label=None with "
            f"scale={scale}; use a model trained with label dropout, or sample with scale 1"
        )
    _check_interval(interval)

    def velocity(x: Array, t: ArrayLike) -> Array:
        t = _per_example(t, x)
        # Interleaved, so that a batch sharded over devices is doubled without moving data.
        pairs = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)
        both = apply(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), pairs).astype(x.dtype)
        both = both.reshape(x.shape[0], 2, *x.shape[1:])
        with_label, without = tangent(x, both[:, 0]), tangent(x, both[:, 1])
        return _extrapolate(without, with_label, t, scale, interval)

    return velocity


def autoguided(
    apply: Network,
    weaker: Network,
    labels: Array,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    tangent: Tangent = sphere.tangent,
) -> Velocity:
    """Returns g + scale (m - g): m from the network, g from a weaker one on the same labels.

    Args and errors as in `classifier_free`.
    """
    _check_interval(interval)

    def velocity(x: Array, t: ArrayLike) -> Array:
        t = _per_example(t, x)
        strong = tangent(x, apply(x, t, labels).astype(x.dtype))
        weak = tangent(x, weaker(x, t, labels).astype(x.dtype))
        return _extrapolate(weak, strong, t, scale, interval)

    return velocity


def _extrapolate(
    base: Array, target: Array, t: Array, scale: float, interval: tuple[float, float]
) -> Array:
    inside = sphere.align((interval[0] <= t) & (t <= interval[1]), target) > 0
    return jnp.where(inside, base + scale * (target - base), target)


def _per_example(t: ArrayLike, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])


def _check_interval(interval: tuple[float, float]) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"a guidance interval is (lo, hi) with 0 <= lo <= hi <= 1; got {interval}; "
            "(0, 1) guides everywhere"
        )
