"""Integrators of the flow from noise (t=1) to data (t=0), one `lax.scan` over the steps.

Six methods, each written once against a `Space`: geodesic on the sphere, their textbook forms on
Euclidean space (radius None). State, geometry and times are float32 or float64; the network sees
the state in that type.
"""

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


class Space(NamedTuple):
    """The operations that a step needs: projection to the space, tangents, exp, log, transport."""

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
    """A method: its step, what it remembers before the first one, and its cost.

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
    """Integrate dx/dt = velocity from `times[0]` to `times[-1]`, renormalising after every update.

    Call it inside `jax.jit` whose arguments are the parameters that `velocity_fn` closes over.

    Args:
        velocity_fn: (x [b,n,d], t scalar) -> raw velocity [b,n,d]; projected here.
        x1: noise [b,n,d], float32 or float64 (16-bit floats are raised to float32).
        times: [T+1] decreasing, concrete, T >= 1; see `schedule.time_grid`.
        method: a name in `SAMPLERS`.
        radius: of the sphere; None for Euclidean space.
        plain_end: make the last step first-order where the method would evaluate the network at
            the end time (Heun) or extrapolate to it (ab2, dpm2m; dpm2m does so at t=0 in any case).
        trajectory: return all states instead of the last.

    Returns:
        x at `times[-1]`, [b,n,d]; with `trajectory` all states [T+1,b,n,d], the first being `x1`.

    Raises:
        ValueError: for an unknown method, no step, times that do not decrease, or a bad radius.
    """
    if method not in SAMPLERS:
        raise ValueError(f"unknown sampler {method!r}: choose one of {', '.join(SAMPLERS)}")
    if radius is not None and not radius > 0:
        raise ValueError(
            f"the flow radius must be positive, got {radius}: None means Euclidean space"
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
    """Return the sphere of `radius` as a `Space`."""
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
            f"times must be [T+1] with T >= 1, got shape {grid.shape}: "
            "use schedule.time_grid(steps)"
        )
    if not (np.diff(grid) < 0).all():
        raise ValueError(
            f"times must decrease from noise to data, got {grid[0]:g} ... {grid[-1]:g}: "
            "use schedule.time_grid(steps)"
        )


def _euler_projection(space, slope, x, span, memory):
    """Step straight and let the projection bring the point back (paper, Alg. 2, corrected)."""
    return x + (span.end - span.start) * slope(x, span.start), memory


def _rodrigues(space, slope, x, span, memory):
    """Step along the great circle (paper, Alg. 1)."""
    return space.exponential(x, (span.end - span.start) * slope(x, span.start)), memory


def _geodesic_midpoint(space, slope, x, span, memory):
    """Take the slope half a step ahead, transported back; never evaluates at the end time."""
    h = span.end - span.start
    middle = space.exponential(x, h / 2 * slope(x, span.start))
    ahead = slope(middle, span.start + h / 2)
    return space.exponential(x, h * space.transport(middle, x, ahead)), memory


def _geodesic_heun(space, slope, x, span, memory):
    """Average the slopes at both ends of the step, the far one transported back."""
    h = span.end - span.start
    here = slope(x, span.start)
    far = space.exponential(x, h * here)
    there = space.transport(far, x, slope(far, span.end))
    there = jnp.where(span.plain, here, there)
    return space.exponential(x, h / 2 * (here + there)), memory


def _adams_bashforth(space, slope, x, span, memory):
    """Extrapolate the slope from the one before, transported here; variable step sizes."""
    x_before, slope_before, h_before = memory
    h = span.end - span.start
    here = slope(x, span.start)
    half_ratio = jnp.where(span.plain, 0, h / h_before / 2)
    before = space.transport(x_before, x, slope_before)
    move = h * ((1 + half_ratio) * here - half_ratio * before)
    return space.exponential(x, move), (x, here, h)


def _dpm2m(space, slope, x, span, memory):
    """Extrapolate the data prediction in log time, where the flow to a point is not stiff."""
    data_before, log_step_before = memory
    to_data = -span.start * slope(x, span.start)
    log_step = jnp.log(span.start / span.end)
    weight = jnp.where(span.plain | (span.end <= 0), 0, log_step / (2 * log_step_before))
    move = to_data + weight * (to_data - space.logarithm(x, data_before))
    fraction = (span.start - span.end) / span.start
    memory = (space.exponential(x, to_data), log_step)
    return space.exponential(x, fraction * move), memory


def _nothing(x: Array) -> tuple:
    return ()


# An infinite step before the first one gives the older slope weight zero.
def _slope_before(x: Array) -> tuple[Array, Array, Array]:
    return x, jnp.zeros_like(x), jnp.asarray(-jnp.inf, x.dtype)


def _data_before(x: Array) -> tuple[Array, Array]:
    return x, jnp.asarray(jnp.inf, x.dtype)


SAMPLERS: dict[names.Sampler, Sampler] = {
    "euler_projection": Sampler(_euler_projection, _nothing, order=1, evaluations=1),
    "rodrigues": Sampler(_rodrigues, _nothing, order=1, evaluations=1),
    "geodesic_midpoint": Sampler(_geodesic_midpoint, _nothing, order=2, evaluations=2),
    "geodesic_heun": Sampler(_geodesic_heun, _nothing, order=2, evaluations=2),
    "ab2": Sampler(_adams_bashforth, _slope_before, order=2, evaluations=1),
    "dpm2m": Sampler(_dpm2m, _data_before, order=2, evaluations=1),
}
