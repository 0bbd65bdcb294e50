"""The sphere in R^d as pure functions on the last axis; leading axes (examples, tokens) are free.

The radius is the norm of the base point `x`, so every function serves any radius and any product of
spheres. Arrays are float32 or float64 and results keep that type. All functions are finite and
have finite gradients at zero vectors and at the angles 0 and pi. Equation numbers are those of
arXiv 2601.22904. A per-example argument (`t`, `angle`) is a scalar or has the leading axes of `x`:
[b] goes with [b, n, d].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def dot(x: Array, y: Array) -> Array:
    """Returns the inner product over the last axis, [..., d] x [..., d] -> [..., 1]."""
    return jnp.sum(x * y, axis=-1, keepdims=True)


def norm(x: Array) -> Array:
    """Returns the norm over the last axis, [..., d] -> [..., 1]; its gradient at zero is zero."""
    squared = dot(x, x)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def sinc(z: Array) -> Array:
    """Returns sin(z)/z, by a series below 0.1 where the derivative of the quotient would cancel."""
    small = jnp.abs(z) < 0.1
    s = jnp.where(small, z * z, 0)
    series = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72)))
    away = jnp.where(small, 1, z)
    return jnp.where(small, series, jnp.sin(away) / away)


def align(t: ArrayLike, x: Array) -> Array:
    """Appends axes to a scalar or per-example `t` until it broadcasts against `x`; type of `x`."""
    t = jnp.asarray(t, x.dtype)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def project(x: Array, radius: ArrayLike = 1.0) -> Array:
    """Scales each vector to norm `radius`, [..., d] -> [..., d]; a zero vector stays zero."""
    return x * (radius / _positive(norm(x)))


def tangent(x: Array, v: Array) -> Array:
    """Removes from `v` its component along `x`: the projection to the tangent space at `x`."""
    return v - dot(x, v) / _positive(dot(x, x)) * x


def angle(x: Array, y: Array) -> Array:
    """Returns the angle between `x` and `y` in [0, pi], [..., d] x [..., d] -> [...].

    2 atan2(|a-b|, |a+b|) of the unit vectors: accurate at both ends, where arccos loses half
    the digits.
    """
    return _angle(project(x), project(y))[..., 0]


def distance(x: Array, y: Array) -> Array:
    """Returns the length of the shortest path from `x` to `y` on the sphere of `x`, [...]."""
    return norm(x)[..., 0] * angle(x, y)


def exponential(x: Array, w: Array) -> Array:
    """Moves `x` along a great circle, in the direction and by the length of the tangent `w`."""
    theta = norm(w) / _positive(norm(x))
    return jnp.cos(theta) * x + sinc(theta) * w


def logarithm(x: Array, y: Array) -> Array:
    """Returns the tangent vector at `x` that leads to `y` (scaled to the sphere of `x`).

    Its length is the distance. At antipodes every direction leads there; a fixed one is taken.
    """
    a, b = project(x), project(y)
    omega = _angle(a, b)
    near = dot(a, b) >= 0
    # sin(omega) e, from the short chord to y or to its antipode so that nothing cancels
    p = tangent(a, b - jnp.where(near, a, -a))
    sine = norm(p)
    p = jnp.where(near | (sine > 0), p, _any_tangent(a))
    # omega/sin(omega) has the right derivative at 0, the unit vector p/sin(omega) is stable near pi
    quotient = 1 / sinc(jnp.where(near, omega, 0))
    scale = jnp.where(near, quotient, omega / _positive(sine))
    return norm(x) * scale * p


def geodesic(x0: Array, x1: Array, t: ArrayLike) -> Array:
    """Returns the point at time `t` of the shortest path from `x0` (t=0) to `x1` (t=1).

    Equal to [sin((1-t)W) x0 + sin(tW) x1] / sin W (paper, eq. 12), without its division by sin W.
    """
    return exponential(x0, align(t, x0) * logarithm(x0, x1))


def geodesic_velocity(x0: Array, x1: Array, t: ArrayLike) -> Array:
    """Returns d/dt of `geodesic`: tangent at x_t, of constant length W |x0| (paper, eq. 15)."""
    log = logarithm(x0, x1)
    omega = norm(log) / _positive(norm(x0))
    phase = align(t, x0) * omega
    return jnp.cos(phase) * log - omega * jnp.sin(phase) * x0


def transport(x: Array, y: Array, w: Array) -> Array:
    """Carries the tangent vector `w` at `x` to `y` along the shortest path; an isometry.

    The short form up to a right angle; beyond it the form in the direction e from `x` to `y`, since
    the short one divides by 1 + cos W.
    """
    a, b = project(x), project(y)
    cosine = dot(a, b)
    near = cosine >= 0
    short = -dot(b, w) / (1 + jnp.where(near, cosine, 0)) * (a + b)
    e = project(logarithm(a, b))
    omega = _angle(a, b)
    far = dot(w, e) * ((jnp.cos(omega) - 1) * e - jnp.sin(omega) * a)
    return w + jnp.where(near, short, far)


def uniform(
    keys: Array, shape: tuple[int, ...], radius: ArrayLike = 1.0, dtype: DTypeLike = jnp.float32
) -> Array:
    """Draws uniform points of norm `radius`: one key per example [b], shape (n, d) -> [b, n, d].

    Keys made from global indices (`matching.example_keys`) make the draws independent of sharding.
    """
    return project(normal(keys, shape, dtype), radius)


def normal(keys: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Draws standard normal values, one key per example: keys [b], shape (n, d) -> [b, n, d]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def rotate(keys: Array, x: Array, angle: ArrayLike) -> Array:
    """Turns every token by `angle` (radians) toward a random tangent direction; norms are kept.

    Args:
      keys: [b], one key per example.
      x: [b, n, d].
      angle: scalar, [b] or [b, n].
    """
    direction = project(tangent(x, normal(keys, x.shape[1:], x.dtype)))
    return exponential(x, align(angle, x) * norm(x) * direction)


def _positive(x: Array) -> Array:
    """Replaces zeros by one, for use as a divisor."""
    return jnp.where(x > 0, x, 1)


def _angle(a: Array, b: Array) -> Array:
    """Returns the angle of two unit vectors, [..., 1]."""
    apart, together = norm(a - b), norm(a + b)
    return 2 * jnp.arctan2(apart, jnp.where(apart + together > 0, together, 1))


def _any_tangent(a: Array) -> Array:
    """Returns a unit tangent at `a`, from the axis along which `a` is smallest."""
    axis = jax.nn.one_hot(jnp.argmin(jnp.abs(a), axis=-1), a.shape[-1], dtype=a.dtype)
    return project(tangent(a, axis))
