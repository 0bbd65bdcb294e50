"""The sphere against 40-digit values, another library, and its own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinosae_jax.flow import matching, sphere

RECORDINGS = ["sphere_C3", "sphere_C8", "sphere_C1024"]
RADII = [1.0, 5.5]
NEAR_PI = np.pi - 1e-2
angle_of, distance, geodesic, logarithm, norm, tangent, velocity = map(
    jax.jit,
    (
        sphere.angle,
        sphere.distance,
        sphere.geodesic,
        sphere.logarithm,
        sphere.norm,
        sphere.tangent,
        sphere.geodesic_velocity,
    ),
)


def tolerance(angle):
    """1e-12, and near pi what the direction's conditioning leaves of 1e-15."""
    return np.maximum(1e-12, 1e-15 / np.maximum(np.pi - angle, 1e-300))


def assert_close(actual, expected, allowed):
    error = np.abs(np.asarray(actual) - expected).reshape(len(expected), -1).max(axis=1)
    assert np.all(error <= allowed), f"largest error over tolerance: {np.max(error / allowed):.2f}"


@jax.jit
def along(x, y, w, times):
    """Return log_x(y), exp_x(w), and the points and velocities [angles,times,d] from x to y."""

    def travel(function):
        return jax.vmap(lambda t: function(x, y, t), out_axes=1)(times)

    points, velocities = travel(sphere.geodesic), travel(sphere.geodesic_velocity)
    return sphere.logarithm(x, y), sphere.exponential(x, w), points, velocities


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_reference(load, x64, name, radius):
    case = load(name)
    x, y = radius * case["x"], radius * case["y"]
    allowed = radius * tolerance(case["angle"])
    assert_close(angle_of(x, y), case["ref_omega"], 1e-14)
    assert_close(distance(x, y), radius * case["ref_omega"], radius * 1e-14)
    log, exp, xt, ut = along(x, y, radius * case["u_exp"], case["t"])
    assert_close(log, radius * case["ref_log"], allowed)
    assert_close(exp, radius * case["ref_exp"], allowed)
    assert_close(xt, radius * case["ref_xt"], allowed)
    assert_close(ut, radius * case["ref_ut"], allowed)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_transport(load, x64, name, radius):
    case = load(name)
    carried = jax.jit(sphere.transport)(
        radius * case["x"], radius * case["y"], radius * case["w_tangent"]
    )
    angle = case["angle"]
    allowed = np.where(angle <= NEAR_PI, 1e-11, 1e1 * tolerance(angle))
    assert_close(carried, radius * case["ref_pt"], radius * allowed)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_other_library(load, x64, name):
    case = load(name)
    if "meta_log" not in case:
        pytest.skip("the other library's values in 1024 dimensions are in the complete recordings")
    angle = case["angle"]
    exact = (angle > 1e-6) & (angle < np.pi - 1e-5)
    chord = (angle >= 1e-7) & (angle <= 1e-6)
    x, y = case["x"], case["y"]
    log, exp, xt, ut = along(x, y, case["u_exp"], case["t"])
    ours = {
        "meta_dist": distance(x, y),
        "meta_log": log,
        "meta_exp": exp,
        "meta_xt": xt,
        "meta_ut": ut,
        "meta_proju": tangent(x, case["w_ambient"]),
        "meta_projx": sphere.project(case["w_ambient"]),
    }
    for key, value in ours.items():
        assert_close(value[exact], case[key][exact], 1e-9)
        # below arccos's resolution the other library's distance is zero or a multiple of 1e-8
        if key != "meta_dist" and chord.any():
            assert_close(value[chord], case[key][chord], 1e-10)


def random_points(seed, shape, radius, dtype=np.float64):
    points = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), dtype)


def pair_at_angle(angle, width, dtype, seed=0):
    """Two unit vectors [50,width] at `angle`, made in float64 and rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(50, width))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    e = rng.normal(size=(50, width))
    e -= (e * a).sum(-1, keepdims=True) * a
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    return a.astype(dtype), (np.cos(angle) * a + np.sin(angle) * e).astype(dtype)


@jax.jit
def residuals(x, y, z, t):
    """What must vanish, for unit vectors: name -> array."""
    w, log = sphere.tangent(x, z), sphere.logarithm(x, y)
    x_t, u_t = sphere.geodesic(x, y, t), sphere.geodesic_velocity(x, y, t)
    carried = sphere.transport(x, y, w)
    return {
        "tangent is tangent": sphere.dot(x, w),
        "length of the logarithm": sphere.norm(log)[:, 0] - sphere.distance(x, y),
        "exponential of the logarithm": sphere.exponential(x, log) - y,
        "the path stays on the sphere": sphere.norm(x_t) - 1,
        "the velocity is tangent": sphere.dot(x_t, u_t),
        "the speed is constant": sphere.norm(u_t) - sphere.norm(log),
        "velocity from the start": t * u_t + sphere.logarithm(x_t, x),
        "velocity from the end": (1 - t) * u_t - sphere.logarithm(x_t, y),
        "transport keeps lengths": sphere.norm(carried) - sphere.norm(w),
        "transport ends tangent": sphere.dot(carried, y),
        "transport and back": sphere.transport(y, x, carried) - w,
        "transport along the path": sphere.transport(x, y, log) + sphere.logarithm(y, x),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([2, 7]), st.floats(0, 1))
def test_identities(seed, width, t):
    with jax.enable_x64(True):
        points = [random_points(seed + i, (4, width), 1.0) for i in range(3)]
        for name, value in residuals(*points, t).items():
            # near antipodes the conditioning costs a factor of 1 / (pi - angle)
            np.testing.assert_allclose(value, 0, atol=1e-10, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_the_radius_is_the_norm_of_the_base_point(seed, radius):
    with jax.enable_x64(True):
        x, y, w = (random_points(seed + i, (4, 3), 1.0) for i in range(3))
        w = tangent(x, w)
        times = jnp.asarray([0.0, 0.3, 1.0])
        for unit, scaled in zip(
            along(x, y, w, times), along(radius * x, radius * y, radius * w, times), strict=True
        ):
            np.testing.assert_allclose(scaled, radius * unit, rtol=0, atol=1e-10 * radius)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 1.0, np.pi / 2, 3.0, np.pi - 1e-3])
def test_closed_form_on_the_circle(x64, angle):
    radius, t = 3.0, 0.3
    x = radius * jnp.asarray([1.0, 0.0])
    y = radius * jnp.asarray([np.cos(angle), np.sin(angle)])
    at = [np.cos(t * angle), np.sin(t * angle)]
    np.testing.assert_allclose(geodesic(x, y, t), radius * np.array(at), atol=1e-12)
    turned = radius * angle * np.array([-at[1], at[0]])
    np.testing.assert_allclose(velocity(x, y, t), turned, atol=1e-12)
    np.testing.assert_allclose(logarithm(x, y), [0, radius * angle], atol=1e-12)


def test_velocity_is_the_time_derivative(x64):
    x, y = random_points(0, (5, 3, 6), 2.0), random_points(1, (5, 3, 6), 2.0)
    t = jnp.linspace(0.05, 0.95, 5)
    derivative = jax.jit(lambda t: jax.jvp(lambda t: sphere.geodesic(x, y, t), (t,), (t**0,))[1])(t)
    np.testing.assert_allclose(derivative, velocity(x, y, t), atol=1e-12)


# The columns are the largest errors allowed over 50 pairs of float32 vectors: of the angle, and of
# the rest. The angle of the rounded inputs differs from the nominal one by about 1e-8, so they
# are compared in float64; the direction near pi is conditioned as 1e-7 / (pi - angle).
FLOAT32 = [
    (0.0, 1e-7, 1e-7),
    (1e-6, 1e-7, 1e-7),
    (1e-4, 1e-7, 1e-7),
    (1e-2, 1e-7, 1e-7),
    (np.pi / 2, 5e-7, 6e-7),  # 5.5e-7 where products and sums are not fused
    (np.pi - 1e-2, 5e-7, 2e-5),
    (np.pi - 1e-4, 5e-7, 2e-3),
]


@jax.jit
def everything(x, y):
    path = sphere.geodesic(x, y, 0.4), sphere.geodesic_velocity(x, y, 0.4)
    return sphere.angle(x, y), sphere.logarithm(x, y), *path


@pytest.mark.parametrize("width", [8, 1024])
@pytest.mark.parametrize(("angle", "angle_error", "log_error"), FLOAT32)
def test_float32_accuracy(width, angle, angle_error, log_error):
    x, y = pair_at_angle(angle, width, np.float32)
    ours = everything(x, y)
    assert {a.dtype for a in ours} == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        exact = everything(np.float64(x), np.float64(y))
    for a, b, allowed in zip(ours, exact, (angle_error, *[log_error] * 3), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=allowed)


def test_values_and_gradients_are_finite_everywhere():
    unit = jnp.asarray([1.0, 0.0, 0.0])
    x = jnp.stack([0 * unit, unit, unit, unit, 0 * unit])  # both zero, equal, antipodes, one zero
    y = jnp.stack([0 * unit, unit, -unit, 0 * unit, unit])

    def total(x, y):
        carried = sphere.transport(x, y, jnp.full_like(x, 0.5))
        moving = sphere.geodesic(x, y, 0.5) + sphere.geodesic_velocity(x, y, 0.5)
        return jnp.sum(carried + moving) + jnp.sum(sphere.distance(x, y))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, y)
    assert all(np.all(np.isfinite(a)) for a in (value, *gradients))


def test_zero_vectors_in_the_other_functions():
    def total(x):
        return jnp.sum(sphere.project(x)) + jnp.sum(sphere.norm(x)) + jnp.sum(sphere.tangent(x, x))

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.zeros((2, 3)))
    assert value == 0
    assert np.all(np.isfinite(gradient))
    x = jnp.asarray([2.0, 0.0])
    step = jax.jit(jax.jacobian(lambda w: sphere.exponential(x, w)))(jnp.zeros(2))
    np.testing.assert_array_equal(step, np.eye(2))


def test_logarithm_has_the_right_derivative_at_its_base_point(x64):
    x = 2 * random_points(3, (5,), 1.0)
    jacobian = jax.jit(jax.jacobian(lambda y: sphere.logarithm(x, y)))(x)
    np.testing.assert_allclose(jacobian, np.eye(5) - np.outer(x, x) / 4, atol=1e-14)
    w = sphere.tangent(x, random_points(4, (5,), 1.0))
    turn = jax.jit(jax.jacobian(lambda y: sphere.transport(x, y, w)))(x)
    np.testing.assert_allclose(turn, -np.outer(x, w) / 4, atol=1e-14)


def test_antipodes_are_reached():
    x = random_points(0, (4, 6), 3.0, np.float32)
    np.testing.assert_allclose(norm(logarithm(x, -x)), 3 * np.pi, rtol=1e-6)
    np.testing.assert_allclose(geodesic(x, -x, 1.0), -x, atol=3e-6)


def test_uniform_has_the_moments_of_the_sphere():
    count, width = 4000, 5
    keys = matching.example_keys(jax.random.key(0), jnp.arange(count))
    draw = jax.jit(lambda keys: sphere.uniform(keys, (2, width), 3.0))
    x = np.asarray(draw(keys))
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 3, rtol=1e-6)
    x = x.reshape(-1, width)
    # standard errors: R / sqrt(d N) = 0.015 for means, about R^2 sqrt(2/(d (d+2)) / N) = 0.024
    np.testing.assert_allclose(x.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(x.T @ x / len(x), 9 / width * np.eye(width), atol=0.1)


@pytest.mark.parametrize("devices", [2, 8])
def test_draws_do_not_depend_on_the_devices(devices):
    draw = jax.jit(lambda keys: sphere.uniform(keys, (3, 64), 8.0))
    keys = matching.example_keys(jax.random.key(7), jnp.arange(16))
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    spread = jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_array_equal(draw(spread), draw(keys))
    # the second host of two draws its own rows
    later = matching.example_keys(jax.random.key(7), jnp.arange(8, 16))
    np.testing.assert_array_equal(draw(later), draw(keys)[8:])


@pytest.mark.parametrize("angle", [0.0, 0.3, 2.5])
def test_rotate_turns_by_the_angle(angle):
    keys = matching.example_keys(jax.random.key(1), jnp.arange(6))
    x = random_points(0, (6, 4, 16), 14.0, np.float32) * jnp.linspace(0.5, 2, 4)[:, None]
    rotate = jax.jit(sphere.rotate)
    turned = rotate(keys, x, angle)
    np.testing.assert_allclose(angle_of(x, turned), angle, atol=2e-6)
    np.testing.assert_allclose(norm(turned), norm(x), rtol=1e-6)
    each = jnp.linspace(0.1, 0.6, 6)
    turned = rotate(keys, x, each)
    np.testing.assert_allclose(angle_of(x, turned), each[:, None] + 0 * turned[..., 0], atol=2e-6)
