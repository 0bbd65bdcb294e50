"""Flow matching: the path from data (t=0) to noise (t=1), and the loss on its velocity.

The geodesic path on the product of spheres and three Euclidean paths share one interface, so that
the ablation changes the path and nothing else. Everything here is float32 (float64 if given).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinosae_jax import names
from dinosae_jax.flow import sphere


class Path(NamedTuple):
    """What a path from data to noise is made of; points are [b, n, d], times a scalar or [b]."""

    place: Callable[[Array], Array]
    """Latents -> points of the path's space, at least float32."""
    prior: Callable[[Array, tuple[int, int]], Array]
    """(keys [b], (n, d)) -> noise [b, n, d]."""
    interpolate: Callable[[Array, Array, ArrayLike], Array]
    """(x0, x1, t) -> x_t."""
    velocity: Callable[[Array, Array, ArrayLike], Array]
    """(x0, x1, t) -> dx_t/dt."""
    tangent: Callable[[Array, Array], Array]
    """(x, v) -> the part of v that does not leave the space."""
    radius: float | None
    """Radius of the sphere that the path runs on; None for Euclidean space."""
    keeps_norms: bool
    """Whether samples have the latents' own norms; otherwise they are given the decode radius."""


def make_path(name: str, radius: float) -> Path:
    """Returns the path 'geodesic' (sphere of `radius`) or a Euclidean one.

    'linear' and 'trigonometric' run between latents as they are and noise, 'projected_linear' along
    the chord between latents on the sphere and noise. (A geodesic between latents that are not on
    the sphere does not exist.) The Euclidean prior is Gaussian with root mean square norm
    `radius`: unit variance per element at the default radius sqrt(d).

    Raises:
      ValueError: for an unknown name or a radius that is not positive.
    """
    if name not in PATHS:
        raise ValueError(f"a path is one of {', '.join(PATHS)}; got {name!r}; choose one of these")
    if not radius > 0:
        raise ValueError(
            f"the flow radius must be positive; got {radius}; the default is sqrt(width)"
        )
    return PATHS[name](radius)


def example_keys(key: Array, indices: Array) -> Array:
    """Returns one key per example from its index in the global batch, [b] int32 -> [b] keys."""
    return jax.vmap(partial(jax.random.fold_in, key))(indices)


def loss(
    predict: Callable[[Array, Array], Array],
    path: Path,
    x0: Array,
    x1: Array,
    t: Array,
    *,
    radial_weight: float = 0.0,
    jacobi: str | None = None,
) -> dict[str, Array]:
    """Compares the tangent part of the predicted velocity with the path's; means over all elements.

    The normal part of a prediction never moves a sample (the samplers project it away), so it
    costs nothing by itself. `radial_weight` 1 gives the squared error of the unprojected
    prediction; 0.1 is the value of the paper's second version (arXiv 2601.22904v2).

    Args:
      predict: network velocity (x_t [b, n, d], t [b]) -> [b, n, d].
      path: from `make_path`.
      x0: data [b, n, d], already placed in the path's space.
      x1: noise [b, n, d].
      t: [b] in [0, 1].
      radial_weight: weight of the squared normal part; no effect on Euclidean paths.
      jacobi: per-token weight for the sphere, W the angle from x0 to x1: 'noise' is
        sinc^2((1-t) W) as published (RJF, arXiv 2602.10099), 'data' is sinc^2(t W), the
        sensitivity of the end point that sampling runs to.

    Returns:
      scalars: 'rfm' (the value to minimise), 'tangential' (after Jacobi weights), 'radial'.

    Raises:
      ValueError: for an unknown `jacobi`.
    """
    if jacobi is not None and jacobi not in JACOBI_PHASES:
        raise ValueError(
            f"a Jacobi weighting is one of {', '.join(JACOBI_PHASES)}; got {jacobi!r}; choose one "
            "of these, or None for no weighting"
        )
    x_t = path.interpolate(x0, x1, t)
    prediction = predict(x_t, t).astype(x_t.dtype)
    moving = path.tangent(x_t, prediction)
    squared_error = (moving - path.velocity(x0, x1, t)) ** 2
    if jacobi is not None:
        phase = JACOBI_PHASES[jacobi](sphere.align(t, x0)) * sphere.angle(x0, x1)[..., None]
        squared_error = sphere.sinc(phase) ** 2 * squared_error
    tangential = jnp.mean(squared_error)
    radial = jnp.mean((prediction - moving) ** 2)
    return {
        "rfm": tangential + radial_weight * radial,
        "tangential": tangential,
        "radial": radial,
    }


JACOBI_PHASES: dict[str, Callable[[Array], Array]] = {"noise": lambda t: 1 - t, "data": lambda t: t}


def _geodesic(radius: float) -> Path:
    return Path(
        place=lambda z: sphere.project(_float(z), radius),
        prior=lambda keys, shape: sphere.uniform(keys, shape, radius),
        interpolate=sphere.geodesic,
        velocity=sphere.geodesic_velocity,
        tangent=sphere.tangent,
        radius=radius,
        keeps_norms=False,
    )


def _euclidean(radius: float, weights: Callable, rates: Callable) -> Path:
    """Returns the path a(t) x0 + b(t) x1: `weights` is t -> (a, b), `rates` their derivatives."""

    def mix(coefficients: Callable, x0: Array, x1: Array, t: ArrayLike) -> Array:
        a, b = coefficients(sphere.align(t, x0))
        return a * x0 + b * x1

    return Path(
        place=_float,
        prior=lambda keys, shape: sphere.normal(keys, shape) * (radius / math.sqrt(shape[-1])),
        interpolate=partial(mix, weights),
        velocity=partial(mix, rates),
        tangent=lambda x, v: v,
        radius=None,
        keeps_norms=True,
    )


def _linear(radius: float) -> Path:
    return _euclidean(radius, lambda t: (1 - t, t), lambda t: (-1.0, 1.0))


def _projected_linear(radius: float) -> Path:
    return _linear(radius)._replace(
        place=lambda z: sphere.project(_float(z), radius), keeps_norms=False
    )


def _trigonometric(radius: float) -> Path:
    quarter = math.pi / 2
    return _euclidean(
        radius,
        lambda t: (jnp.cos(quarter * t), jnp.sin(quarter * t)),
        lambda t: (-quarter * jnp.sin(quarter * t), quarter * jnp.cos(quarter * t)),
    )


def _float(z: Array) -> Array:
    """Raises 16-bit floats to float32; leave float32 and float64."""
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


PATHS: dict[names.FlowPath, Callable[[float], Path]] = {
    "geodesic": _geodesic,
    "linear": _linear,
    "trigonometric": _trigonometric,
    "projected_linear": _projected_linear,
}
