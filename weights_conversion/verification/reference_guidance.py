"""Guidance exactly as each reference class defines it, for verification only.

The five functions differ in which channels, samples and times they guide. The project's own
guidance, on tangent vectors of the sphere, is in `flow.guidance`. Common to all: x [2b, h, w, c],
t [2b] with t=1 noise (t=0 noise for the original LightningDiT), y [2b] labels then null labels;
`model` and `guide` map (x, t, y) to a velocity; the result is [2b, h, w, c].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Model = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _double(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


def _both(model: Model, x: jax.Array, t: jax.Array, y: jax.Array) -> list[jax.Array]:
    """Velocities of the first half of x under the labels and under the null labels."""
    return jnp.split(model(_double(x[: len(x) // 2]), t, y), 2)


def lightningdit_cfg(model: Model, x, t, y, scale, interval_start=None) -> jax.Array:
    """Original LightningDiT: guides channels 0..2 only, and only from t[0] >= interval_start on.

    The other channels stay each half's own prediction.
    """
    cond, null = _both(model, x, t, y)
    guided = null + scale * (cond - null)
    if interval_start is not None:
        guided = jnp.where(t[0] < interval_start, cond, guided)
    halves = [jnp.concatenate([guided[..., :3], own[..., 3:]], -1) for own in (cond, null)]
    return jnp.concatenate(halves)


def rae_lightningdit_cfg(
    model: Model, x, t, y, scale, off: Sequence[tuple[float, float]] = (), off_scale=1.0
) -> jax.Array:
    """RAE's LightningDiT: guides all channels, except (scale `off_scale`) where lo <= t[0] < hi."""
    cond, null = _both(model, x, t, y)
    inside = jnp.zeros((), bool)
    for low, high in off:
        inside |= (low <= t[0]) & (t[0] < high)
    return _double(null + jnp.where(inside, off_scale, scale) * (cond - null))


def rae_lightningdit_autoguidance(model: Model, guide: Model, x, t, y, scale) -> jax.Array:
    """RAE's LightningDiT: extrapolates from a weaker model, on the first half of the batch."""
    half = [a[: len(a) // 2] for a in (x, t, y)]
    weak = guide(*half)
    return _double(weak + scale * (model(*half) - weak))


def ditdh_cfg(model: Model, x, t, y, scale, interval=(0.0, 1.0)) -> jax.Array:
    """DiT^DH: guides all channels of each sample whose time lies in [lo, hi]."""
    cond, null = _both(model, x, t, y)
    on = _within(t[: len(t) // 2], interval)
    return _double(jnp.where(on, null + scale * (cond - null), cond))


def ditdh_autoguidance(
    model: Model, guide: Model, x, t, y, scale, interval=(0.0, 1.0)
) -> jax.Array:
    """DiT^DH: extrapolates from a weaker model on the whole doubled batch, labels as they are."""
    strong, weak = model(x, t, y), guide(x, t, y)
    return jnp.where(_within(t, interval), weak + scale * (strong - weak), strong)


def _within(t: jax.Array, interval: tuple[float, float]) -> jax.Array:
    low, high = interval
    return ((low <= t) & (t <= high))[:, None, None, None]
