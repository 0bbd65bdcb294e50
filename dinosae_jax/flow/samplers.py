"""Integrators of the flow from noise (t=1) to data (t=0), one `lax.scan` over the steps.

Six methods, each written once against a `Space`: geodesic on the sphere, their textbook forms on
Euclidean space (radius None). State, geometry and times are float32 or float64; the network sees
the state in that type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dinosae_jax import names
from dinosae_jax.flow import sphere

Velocity = Callable[[Array, Array], Array]
SlopeMemory = tuple[Array, Array, Array]  # x, slope and step size of the step before
DataMemory = tuple[Array, Array]  # data prediction and log step size of the step before


class Space(NamedTuple):
    """The operations of a step: projection to the space and to tangents, exp, log, transport."""

    project: Callable[[Array], Array]
    tangent: Callable[[Array, Array], Array]
    exponential: Callable[[Array, Array], Array]
    logarithm: Callable[[Array, Array], Array]
    transport: Callable[[Array, Array, Array], Array]


class Span(NamedTuple):
    """One step in time, scalars: from `start` down to `end`; `plain` asks for first order."""

    start: Array
    end: Array
    plain: Array


class Sampler(NamedTuple):
    """A method: its step, its memory before the first step, its order and its cost.

    `step(space, slope, x, span, memory) -> (x, memory)`, where slope(x, t) is the tangent velocity;
    `order` is the global order, `evaluations` the network calls per step.
    """

    step: Callable[[Space, Velocity, Array, Span, Any], tuple[Array, Any]]
    remember: Callable[[Array], Any]
    order: int
    evaluations: int


def sample(
    velocity_fn: Velocity,
    x1: Array,
    times: ArrayLike,
    method: str,
    radius: float | None,
    *,
    plain_end: bool = True,
    trajectory: bool = False,
) -> Array:
    """Integrates dx/dt = velocity from `times[0]` to `times[-1]`, renormalising after every update.

    Call it inside `jax.jit` whose arguments are the parameters that `velocity_fn` closes over.

    Args:
      velocity_fn: (x [b, n, d], t scalar) -> raw velocity [b, n, d]; projected here.
      x1: noise [b, n, d], float32 or float64 (16-bit floats are raised to float32).
      times: [T+1] decreasing, concrete, T >= 1; see `schedule.time_grid`.
      method: a name in `SAMPLERS`.
      radius: radius of the sphere; None for Euclidean space.
      plain_end: whether the last step is of first order where the method would evaluate the
        network at the end time (Heun) or extrapolate to it (ab2, dpm2m; dpm2m's is so at t=0 in
        any case).
      trajectory: whether to return all states instead of the last.

    Returns:
      x at `times[-1]`, [b, n, d]; with `trajectory` all states [T+1, b, n, d], `x1` first.

    Raises:
      ValueError: for an unknown method, no step, times that do not decrease, or a bad radius.
    """
    if method not in SAMPLERS:
        raise ValueError(
            f"a sampler is one of {', '.join(SAMPLERS)}; got {method!r}; choose one of these"
        )
    if radius is not None and not radius > 0:
        raise ValueError(
            f"the flow radius must be positive; got {radius}; None means Euclidean space"
        )
    grid = np.asarray(times, np.float64)
    _check_times(grid)
    x1 = x1.astype(jnp.promote_types(x1.dtype, jnp.float32))
    space = EUCLIDEAN if radius is None else sphere_space(radius)
    sampler = SAMPLERS[method]

    def slope(x: Array, t: Array) -> Array:
        return space.tangent(x, velocity_fn(x, t).astype(x.dtype))

    def update(carry: tuple[Array, Any], span: Span) -> tuple[tuple[Array, Any], Array | None]:
        x, memory = sampler.step(space, slope, carry[0], span, carry[1])
        x = space.project(x)
        return (x, memory), x if trajectory else None

    steps = len(grid) - 1
    t = jnp.asarray(grid, x1.dtype)
    spans = Span(t[:-1], t[1:], jnp.arange(steps) == (steps - 1 if plain_end else steps))
    x = space.project(x1)
    (x0, _), states = jax.lax.scan(update, (x, sampler.remember(x)), spans)
    return x0 if states is None else jnp.concatenate([x[None], states])


def sphere_space(radius: float) -> Space:
    """Returns the sphere of `radius` as a `Space`."""
    return Space(
        project=partial(sphere.project, radius=radius),
        tangent=sphere.tangent,
        exponential=sphere.exponential,
        logarithm=sphere.logarithm,
        transport=sphere.transport,
    )


EUCLIDEAN = Space(
    project=lambda x: x,
    tangent=lambda x, v: v,
    exponential=lambda x, w: x + w,
    logarithm=lambda x, y: y - x,
    transport=lambda x, y, w: w,
)


def _check_times(grid: np.ndarray) -> None:
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            f"times must be [T+1] with T >= 1; got shape {list(grid.shape)}; "
            "use schedule.time_grid(steps)"
        )
    if not (np.diff(grid) < 0).all():
        raise ValueError(
            f"times must decrease from noise to data; got {grid[0]:g} ... {grid[-1]:g}; "
            "use schedule.time_grid(steps)"
        )


def _euler_projection(
    space: Space, slope: Velocity, x: Array, span: Span, memory: tuple[()]
) -> tuple[Array, tuple[()]]:
    """Projected Euler method: order 1, one evaluation per step.

    Takes a straight step, which the projection after it brings back to the sphere (arXiv
    2601.22904, Alg. 2, with the sign of the step corrected; Hairer, Lubich, Wanner, "Geometric
    Numerical Integration", IV.4).
    """
    return x + (span.end - span.start) * slope(x, span.start), memory


def _rodrigues(
    space: Space, slope: Velocity, x: Array, span: Span, memory: tuple[()]
) -> tuple[Array, tuple[()]]:
    """Geodesic Euler method: order 1, one evaluation per step.

    Moves along the great circle whose direction is the slope, by Rodrigues' rotation formula
    (arXiv 2601.22904, Alg. 1). In Euclidean space this is Euler's method.
    """
    return space.exponential(x, (span.end - span.start) * slope(x, span.start)), memory


def _geodesic_midpoint(
    space: Space, slope: Velocity, x: Array, span: Span, memory: tuple[()]
) -> tuple[Array, tuple[()]]:
    """Explicit midpoint method: order 2, two evaluations per step, none at the end time.

    Takes the slope half a step ahead and transports it back to `x` before the full step (Hairer,
    Norsett, Wanner, "Solving Ordinary Differential Equations I", II.1, for Euclidean space).
    """
    h = span.end - span.start
    middle = space.exponential(x, h / 2 * slope(x, span.start))
    ahead = slope(middle, span.start + h / 2)
    return space.exponential(x, h * space.transport(middle, x, ahead)), memory


def _geodesic_heun(
    space: Space, slope: Velocity, x: Array, span: Span, memory: tuple[()]
) -> tuple[Array, tuple[()]]:
    """Heun's method (trapezoidal): order 2, two evaluations per step, one at the end time.

    Averages the slopes at both ends of an Euler step, the far one transported back to `x` (Karras
    et al., arXiv 2206.00364, Alg. 1, for Euclidean space). A `plain` step is Euler's.
    """
    h = span.end - span.start
    here = slope(x, span.start)
    far = space.exponential(x, h * here)
    there = space.transport(far, x, slope(far, span.end))
    there = jnp.where(span.plain, here, there)
    return space.exponential(x, h / 2 * (here + there)), memory


def _adams_bashforth(
    space: Space, slope: Velocity, x: Array, span: Span, memory: SlopeMemory
) -> tuple[Array, SlopeMemory]:
    """Adams-Bashforth method of two steps: order 2, one evaluation per step.

    Extrapolates linearly from the slope of the step before, transported to `x`, to half a step
    ahead; the weights are those of variable step sizes (Hairer, Norsett, Wanner, "Solving Ordinary
    Differential Equations I", III.5). The first step and a `plain` one are Euler's.
    """
    x_before, slope_before, h_before = memory
    h = span.end - span.start
    here = slope(x, span.start)
    half_ratio = jnp.where(span.plain, 0, h / h_before / 2)
    before = space.transport(x_before, x, slope_before)
    move = h * ((1 + half_ratio) * here - half_ratio * before)
    return space.exponential(x, move), (x, here, h)


def _dpm2m(
    space: Space, slope: Velocity, x: Array, span: Span, memory: DataMemory
) -> tuple[Array, DataMemory]:
    """DPM-Solver++(2M): order 2, one evaluation per step.

    Integrates the data prediction instead of the slope, extrapolated linearly in log time from the
    step before, so that the flow towards a point is not stiff (Lu et al., arXiv 2211.01095, Alg.
    2). The prediction is the end of the geodesic from `x` with the slope kept until t=0.
    """
    data_before, log_step_before = memory
    to_data = -span.start * slope(x, span.start)
    log_step = jnp.log(span.start / span.end)
    weight = jnp.where(span.plain | (span.end <= 0), 0, log_step / (2 * log_step_before))
    move = to_data + weight * (to_data - space.logarithm(x, data_before))
    fraction = (span.start - span.end) / span.start
    memory = (space.exponential(x, to_data), log_step)
    return space.exponential(x, fraction * move), memory


def _nothing(x: Array) -> tuple[()]:
    return ()


# An infinite step before the first gives the older slope weight zero.
def _slope_before(x: Array) -> SlopeMemory:
    return x, jnp.zeros_like(x), jnp.asarray(-jnp.inf, x.dtype)


def _data_before(x: Array) -> DataMemory:
    return x, jnp.asarray(jnp.inf, x.dtype)


SAMPLERS: dict[names.Sampler, Sampler] = {
    "euler_projection": Sampler(_euler_projection, _nothing, order=1, evaluations=1),
    "rodrigues": Sampler(_rodrigues, _nothing, order=1, evaluations=1),
    "geodesic_midpoint": Sampler(_geodesic_midpoint, _nothing, order=2, evaluations=2),
    "geodesic_heun": Sampler(_geodesic_heun, _nothing, order=2, evaluations=2),
    "ab2": Sampler(_adams_bashforth, _slope_before, order=2, evaluations=1),
    "dpm2m": Sampler(_dpm2m, _data_before, order=2, evaluations=1),
}
