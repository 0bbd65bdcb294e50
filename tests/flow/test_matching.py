"""Paths, and the loss with its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.flow import matching, sphere

RADIUS = 4.0
SHAPE = (3, 16)
T = np.linspace(0.02, 0.98, 6, dtype=np.float32)
uniform = jax.jit(sphere.uniform, static_argnums=(1, 2))


def ends(name, count=6):
    path = matching.make_path(name, RADIUS)
    latents = np.random.default_rng(1).normal(scale=1.3, size=(count, *SHAPE)).astype(np.float32)

    @jax.jit
    def draw(latents):
        keys = matching.example_keys(jax.random.key(0), jnp.arange(count))
        return path.place(latents), path.prior(keys, SHAPE)

    return path, *draw(latents)


def loss_of(predict, path, *arrays, **options):
    """matching.loss, compiled."""
    return jax.jit(lambda *arrays: matching.loss(predict, path, *arrays, **options))(*arrays)


@pytest.mark.parametrize("name", matching.PATHS)
def test_path_joins_data_to_noise_with_its_derivative_as_velocity(name):
    path, x0, x1 = ends(name)
    at = jax.jit(path.interpolate)
    # cos(pi/2) is -4e-8 in float32
    np.testing.assert_allclose(at(x0, x1, 0.0), x0, atol=3e-6)
    np.testing.assert_allclose(at(x0, x1, 1.0), x1, atol=3e-6)

    @jax.jit
    def differentiate(t):
        x_t, slope = jax.jvp(lambda t: path.interpolate(x0, x1, t), (t,), (jnp.ones_like(t),))
        velocity = path.velocity(x0, x1, t)
        return slope, velocity, path.tangent(x_t, velocity)

    slope, velocity, tangent = differentiate(T)
    np.testing.assert_allclose(velocity, slope, atol=2e-5)
    np.testing.assert_allclose(velocity, tangent, atol=2e-5)


def test_recorded_linear_path(load):
    recorded = load("schedules")
    path = matching.make_path("linear", 1.0)
    x0, x1, t = recorded["plan_data"], recorded["plan_noise"], recorded["plan_t"]
    expected = recorded["plan_xt"]
    np.testing.assert_allclose(path.interpolate(x0, x1, t), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(path.velocity(x0, x1, t), recorded["plan_ut"], rtol=0, atol=1e-6)


def test_geodesic_is_nearly_trigonometric_in_many_dimensions():
    """Independent directions are at 90 degrees within 1/sqrt(d)."""
    keys = matching.example_keys(jax.random.key(0), jnp.arange(4))
    x0, x1 = (uniform(keys[i : i + 2], (8, 1024), 32.0) for i in (0, 2))
    geodesic, trigonometric = (matching.make_path(p, 32.0) for p in ("geodesic", "trigonometric"))
    difference = geodesic.interpolate(x0, x1, 0.5) - trigonometric.interpolate(x0, x1, 0.5)
    assert float(sphere.norm(difference).max()) < 0.06 * 32


def test_prior_of_the_euclidean_paths_has_the_radius_as_its_norm():
    path = matching.make_path("linear", 8.0)
    keys = matching.example_keys(jax.random.key(0), jnp.arange(200))
    x1 = path.prior(keys, (4, 64))
    # 200*4*64 values: the mean square has a relative standard error of 0.6%
    assert float(jnp.mean(x1**2)) == pytest.approx(1.0, rel=0.03)


def test_place_raises_precision_and_projects():
    z = jnp.ones((1, 2, 4), jnp.bfloat16)
    placed = matching.make_path("geodesic", 6.0).place(z)
    assert placed.dtype == jnp.float32
    np.testing.assert_allclose(placed, 3.0, rtol=1e-6)
    assert matching.make_path("linear", 6.0).place(z).dtype == jnp.float32


def test_projected_linear_is_linear_between_points_of_the_sphere_and_gaussian_noise():
    path, plain = (matching.make_path(name, 6.0) for name in ("projected_linear", "linear"))
    z = 3 * jax.random.normal(jax.random.PRNGKey(0), (2, 4, 8))
    placed = path.place(z)
    assert jnp.allclose(jnp.linalg.norm(placed, axis=-1), 6.0, rtol=1e-6)
    assert jnp.allclose(path.velocity(placed, z, 0.5), plain.velocity(placed, z, 0.5))
    assert (path.radius, path.keeps_norms) == (None, False)
    assert (plain.radius, plain.keeps_norms) == (None, True)
    assert matching.make_path("geodesic", 6.0).radius == 6.0


def test_loss_of_a_zero_network_is_the_mean_square_speed():
    """E u^2 per element is R^2/d (pi^2/4 + 1/d): 2.468 at R = sqrt(d), d = 1024."""
    path = matching.make_path("geodesic", 32.0)
    keys = matching.example_keys(jax.random.key(0), jnp.arange(8))
    x0, x1 = (uniform(keys[i : i + 4], (16, 1024), 32.0) for i in (0, 4))
    terms = loss_of(lambda x, t: 0 * x, path, x0, x1, T[:4])
    # 64 angles with a standard deviation of 0.031: 2% of the mean square at five standard errors
    assert float(terms["rfm"]) == pytest.approx(2.468, rel=0.025)
    assert float(terms["radial"]) == 0


@pytest.mark.parametrize("name", matching.PATHS)
def test_loss_vanishes_at_the_target_and_ignores_the_normal_part(name):
    path, x0, x1 = ends(name)

    def perfect(x, t):
        return path.velocity(x0, x1, t) + (0.7 * x if name == "geodesic" else 0)

    terms = loss_of(perfect, path, x0, x1, T, radial_weight=0.1)
    radial = 0.49 * RADIUS**2 / SHAPE[-1] if name == "geodesic" else 0.0
    np.testing.assert_allclose(terms["tangential"], 0, atol=1e-10)
    np.testing.assert_allclose(terms["radial"], radial, rtol=1e-5)
    np.testing.assert_allclose(terms["rfm"], 0.1 * radial, rtol=1e-5, atol=1e-10)


def test_full_radial_weight_is_the_unprojected_error():
    path, x0, x1 = ends("geodesic")
    predict = lambda x, t: jnp.sin(3 * x) + sphere.align(t, x)  # noqa: E731
    x_t = path.interpolate(x0, x1, T)
    plain = jnp.mean((predict(x_t, T) - path.velocity(x0, x1, T)) ** 2)
    terms = loss_of(predict, path, x0, x1, T, radial_weight=1.0)
    np.testing.assert_allclose(terms["rfm"], plain, rtol=1e-6)


@pytest.mark.parametrize("jacobi", ["noise", "data"])
def test_jacobi_weights(jacobi):
    path, x0, x1 = ends("geodesic")
    omega = np.float64(sphere.angle(x0, x1))
    t = np.float64(T)[:, None]
    phase = omega * (1 - t if jacobi == "noise" else t)
    expected = np.mean((np.sin(phase) / phase) ** 2 * (RADIUS * omega) ** 2) / SHAPE[-1]
    terms = loss_of(lambda x, t: 0 * x, path, x0, x1, T, jacobi=jacobi)
    np.testing.assert_allclose(terms["tangential"], expected, rtol=1e-5)


def test_gradients_are_finite_where_data_meets_noise():
    path, x0, _ = ends("geodesic")

    @jax.jit
    @jax.value_and_grad
    def objective(scale, x1):
        return matching.loss(lambda x, t: scale * x, path, x0, x1, T, jacobi="data")["rfm"]

    for x1 in (x0, -x0):
        value, gradient = objective(1.0, x1)
        assert np.isfinite(value)
        assert np.isfinite(gradient)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matching.make_path("cubic", 1.0), "a path is one of .*; got 'cubic'"),
        (lambda: matching.make_path("linear", 0.0), "radius must be positive"),
        (
            lambda: matching.loss(lambda x, t: x, *ends("geodesic"), T, jacobi="both"),
            "a Jacobi weighting is one of noise, data",
        ),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
