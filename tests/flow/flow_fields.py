"""Velocity fields with known answers, as functions of recorded arrays."""

import jax
import jax.numpy as jnp

from dinosae_jax.flow import sphere


def smooth(recorded):
    """A smooth field coupling tokens and channels, with a radial leak to be projected out."""
    radius, omega = recorded["R"], recorded["field_omega"]

    def velocity(x, t):
        mixed = jnp.einsum("mn,bnd->bmd", recorded["field_M"], x)
        constant = radius * jnp.sin(omega * t) * recorded["field_c"]
        linear = x @ recorded["field_B"].T
        return linear + jnp.cos(omega * t) * mixed + constant + recorded["field_leak"] * x

    return velocity


def to_points(points, weights):
    """The exact marginal velocity -(1/t) sum_k q_k log_x(y_k) of weighted data points [k,n,d].

    q_k is proportional to w_k prod_tokens (sin(rho/t) / sin rho)^(d-2) where every rho < pi t, and
    zero elsewhere: the density of x_t given the point, rho being the angle from it.
    """
    points, weights = jnp.asarray(points), jnp.asarray(weights)

    def velocity(x, t):
        rho = sphere.angle(x[:, None], points[None])
        reached = rho < jnp.pi * t
        stretch = jnp.where(reached, jnp.sin(rho / t) / jnp.sin(rho), 1)
        log_density = (points.shape[-1] - 2) * jnp.log(stretch)
        log_density = jnp.where(reached, log_density, -jnp.inf).sum(-1) + jnp.log(weights)
        q = jax.nn.softmax(log_density, axis=1)[:, :, None, None]
        return -jnp.sum(q * sphere.logarithm(x[:, None], points[None]), axis=1) / t

    return velocity
