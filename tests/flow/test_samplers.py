"""Samplers against recorded trajectories, their orders, and a field whose samples are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.flow import matching, schedule, sphere
from dinosae_jax.flow.samplers import SAMPLERS, sample
from tests.flow.flow_fields import smooth, to_points

RECORDED_NAMES = {
    "euler_projection": "euler_proj",
    "rodrigues": "rodrigues",
    "geodesic_midpoint": "midpoint_geo",
    "geodesic_heun": "heun_geo",
    "ab2": "ab2_pt",
    "dpm2m": "dpm2m",
}


def only_fast(method, without=""):
    """All samplers but `without`; the others than `method` with `-m slow`."""
    names = [name for name in SAMPLERS if name != without]
    return [pytest.param(n, marks=[pytest.mark.slow] * (n != method)) for n in names]


def integrate(velocity, x1, times, method, radius, **options):
    return jax.jit(lambda x: sample(velocity, x, times, method, radius, **options))(x1)


@pytest.mark.parametrize("method", [name for name in SAMPLERS if name != "dpm2m"])
def test_recorded_trajectories_of_a_smooth_field(load, x64, method):
    recorded = load("smooth_field")
    x1, radius = jnp.asarray(recorded["x_init"]), float(recorded["R"])
    for steps in (4, 10, 50):
        times = recorded[f"grid_N{steps}"]
        # recorded without a special last step
        options = {"plain_end": False, "trajectory": True}
        states = integrate(smooth(recorded), x1, times, method, radius, **options)
        expected = recorded[f"traj_{RECORDED_NAMES[method]}_N{steps}"]
        assert states.dtype == jnp.float64
        assert len(states) == steps + 1
        np.testing.assert_allclose(states[-len(expected) :], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", only_fast("dpm2m", without="geodesic_heun"))
def test_recorded_ends_on_the_exact_field(load, x64, method):
    recorded = load("empirical_rfm_field")
    velocity = to_points(recorded["field_Y"], recorded["field_w"])
    x1, radius = jnp.asarray(recorded["x_init"]), float(recorded["R"])
    for steps in (4, 10, 50):
        times = recorded[f"grid_N{steps}"]
        x0 = integrate(velocity, x1, times, method, radius, plain_end=method == "dpm2m")
        expected = recorded[f"final_{RECORDED_NAMES[method]}_N{steps}"]
        np.testing.assert_allclose(x0, expected, rtol=0, atol=1e-8)


def runge_kutta_projected(slope, x, t, h):
    """The 3/8 rule in the ambient space, every stage projected."""
    radius = sphere.norm(x)
    k1 = slope(x, t)
    k2 = slope(sphere.project(x + h * k1 / 3, radius), t + h / 3)
    k3 = slope(sphere.project(x + h * (k2 - k1 / 3), radius), t + 2 * h / 3)
    k4 = slope(sphere.project(x + h * (k1 - k2 + k3), radius), t + h)
    return x + h / 8 * (k1 + 3 * (k2 + k3) + k4)


def runge_kutta_normal_coordinates(slope, x, t, h):
    """The classical rule in normal coordinates at x (RKMK4)."""

    def pulled_back(w, at):
        y = sphere.exponential(x, w)
        v = sphere.transport(y, x, slope(y, at))
        squared = sphere.dot(w, w)
        along = sphere.dot(v, w) / jnp.where(squared > 0, squared, 1) * w
        across = (v - along) / sphere.sinc(jnp.sqrt(squared) / sphere.norm(x))
        return along + across

    k1 = slope(x, t)
    k2 = pulled_back(h / 2 * k1, t + h / 2)
    k3 = pulled_back(h / 2 * k2, t + h / 2)
    k4 = pulled_back(h * k3, t + h)
    return sphere.exponential(x, h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


@pytest.mark.parametrize(
    ("name", "step"),
    [("rk4_proj", runge_kutta_projected), ("rkmk4", runge_kutta_normal_coordinates)],
)
def test_recorded_fourth_order_trajectories(load, x64, name, step):
    """Methods that are not offered: they hold the geometry that those of `SAMPLERS` are made of."""
    recorded = load("smooth_field")
    field, radius = smooth(recorded), float(recorded["R"])
    slope = lambda x, t: sphere.tangent(x, field(x, t))  # noqa: E731
    advance = jax.jit(lambda x, t, h: sphere.project(step(slope, x, t, h), radius))
    for steps in (4, 10, 50):
        times = recorded[f"grid_N{steps}"]
        states = [jnp.asarray(recorded["x_init"])]
        for start, end in itertools.pairwise(times):
            states.append(advance(states[-1], start, end - start))
        expected = recorded[f"traj_{name}_N{steps}"]
        np.testing.assert_allclose(states[-len(expected) :], expected, rtol=0, atol=1e-10)
    error = float(sphere.angle(states[-1], recorded["reference_t0"]).max())
    assert error < 1e-6  # 50 steps; those of second order are at 1e-4


def test_recorded_solution_of_the_exact_field(load, x64):
    recorded = load("empirical_rfm_field")
    velocity = jax.jit(to_points(recorded["field_Y"], recorded["field_w"]))
    end, solution = float(recorded["reference_t_end"]), jnp.asarray(recorded["reference"])
    expected = recorded["v_at_ref_t_end"]
    np.testing.assert_allclose(velocity(solution, end), expected, rtol=0, atol=1e-8)
    times = np.geomspace(1.0, end, 801)
    x1, radius = jnp.asarray(recorded["x_init"]), float(recorded["R"])
    x0 = integrate(velocity, x1, times, "dpm2m", radius)
    assert float(sphere.angle(x0, solution).max()) < 1e-5
    angles = sphere.angle(x0[:, None], recorded["field_Y"][None]).max(-1)
    np.testing.assert_array_equal(np.argmin(angles, axis=1), recorded["nearest_data_index"])


def test_recorded_fields_at_the_start(load, x64):
    recorded = load("smooth_field")
    x = jnp.asarray(recorded["x_init"])
    raw = smooth(recorded)(x, 1.0)
    np.testing.assert_allclose(raw, recorded["v_at_init_t1_raw"], rtol=0, atol=1e-12)
    expected = recorded["v_at_init_t1_tangent"]
    np.testing.assert_allclose(sphere.tangent(x, raw), expected, rtol=0, atol=1e-12)
    recorded = load("empirical_rfm_field")
    velocity = jax.jit(to_points(recorded["field_Y"], recorded["field_w"]))
    at_start = velocity(jnp.asarray(recorded["x_init"]), 1.0)
    np.testing.assert_allclose(at_start, recorded["v_at_init_t1"], rtol=0, atol=1e-10)


def test_recorded_euclidean_euler(load):
    recorded = load("schedules")
    a, b = recorded["rae_euler_A"], recorded["rae_euler_b"]
    times = schedule.shift_time(1 - np.linspace(0, 0.999, 5), 8.0)
    np.testing.assert_allclose(times[:-1], recorded["rae_euler_call_times"], rtol=0, atol=1e-6)
    x1 = jnp.asarray(recorded["rae_euler_x_init"])
    velocity = lambda x, t: t * (x @ a) + b  # noqa: E731
    states = integrate(velocity, x1, times, "euler_projection", None, trajectory=True)
    np.testing.assert_allclose(states, recorded["rae_euler_traj"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", only_fast("dpm2m"))
def test_order_of_convergence_on_the_sphere(load, x64, method):
    recorded = load("smooth_field")
    x1, exact = jnp.asarray(recorded["x_init"]), recorded["reference_t0"]
    errors = []
    for steps in (48, 96):
        times = schedule.time_grid(steps)
        x0 = integrate(smooth(recorded), x1, times, method, float(recorded["R"]))
        errors.append(float(sphere.angle(x0, exact).max()))
    slope = np.log2(errors[0] / errors[1])
    # DPM-2M works in log time, whose steps near t=0 do not shrink: an error of T^-2 log T
    slack = 0.35 if method == "dpm2m" else 0.2
    assert slope == pytest.approx(SAMPLERS[method].order, abs=slack), errors


@pytest.mark.parametrize("method", only_fast("dpm2m"))
def test_order_of_convergence_in_euclidean_space(x64, method):
    """dx/dt = x + t from 1 down to 1/2 has the solution (x(1) + 2) e^(t-1) - t - 1."""
    x1 = jnp.asarray([[[1.0, -2.0]]])
    exact = (x1 + 2) * np.exp(-0.5) - 1.5
    errors = []
    for steps in (32, 64):
        times = np.linspace(1, 0.5, steps + 1)
        x0 = integrate(lambda x, t: x + t, x1, times, method, None, plain_end=False)
        errors.append(float(np.abs(x0 - exact).max()))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(SAMPLERS[method].order, abs=0.1), errors


@pytest.mark.slow
@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_of_the_exact_field_have_the_class_weights(method):
    count, width = 1500, 8
    radius = width**0.5
    points = sphere.project(jax.random.normal(jax.random.key(3), (3, 2, width)), radius)
    weights = np.array([0.2, 0.3, 0.5])
    keys = matching.example_keys(jax.random.key(4), jnp.arange(count))
    x1 = sphere.uniform(keys, (2, width), radius)
    x0 = integrate(to_points(points, weights), x1, schedule.time_grid(40, 2.0), method, radius)
    angles = sphere.angle(x0[:, None], points[None]).max(-1)
    share = np.bincount(np.argmin(angles, axis=1), minlength=3) / count
    # four standard errors of a binomial share
    assert np.all(np.abs(share - weights) < 4 * np.sqrt(weights * (1 - weights) / count)), share
    # Euler with projection stops short of the point, as a chord does of its arc
    end = np.quantile(np.min(angles, axis=1), 0.95)
    assert end < (0.1 if method == "euler_projection" else 0.02)


@pytest.mark.parametrize("steps", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", only_fast("euler_projection"))
def test_a_single_target_is_reached(method, steps):
    target = sphere.project(jax.random.normal(jax.random.key(0), (1, 2, 16)), 4.0)
    x1 = sphere.project(jax.random.normal(jax.random.key(1), (8, 2, 16)), 4.0)
    x0 = integrate(to_points(target, [1.0]), x1, schedule.time_grid(steps), method, 4.0)
    np.testing.assert_allclose(sphere.norm(x0), 4.0, rtol=1e-6)
    if method == "euler_projection":
        # a straight step of length th turns by atan(th); T of them leave this part of the angle
        left = sphere.angle(x1, target)
        for k in range(steps):
            left -= jnp.arctan(left / (steps - k))
        np.testing.assert_allclose(sphere.angle(x0, target), left, atol=2e-5)
    else:
        np.testing.assert_allclose(x0, jnp.broadcast_to(target, x0.shape), atol=1e-4)


@pytest.mark.parametrize("method", SAMPLERS)
def test_number_of_steps_and_evaluations(method):
    calls = []

    def velocity(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.roll(x, 1, axis=-1)

    x1 = jnp.arange(1.0, 9).reshape(2, 1, 4)
    grid = schedule.time_grid(6, 3.0)
    jax.block_until_ready(integrate(velocity, x1, grid, method, 1.0))
    jax.effects_barrier()
    assert len(calls) == 6 * SAMPLERS[method].evaluations
    assert set(np.float32(grid[:-1])) <= set(np.float32(calls))


@pytest.mark.parametrize("method", SAMPLERS)
def test_state_is_float32_and_on_the_sphere(method):
    x1 = jax.random.normal(jax.random.key(0), (4, 3, 32), jnp.bfloat16)
    velocity = lambda x, t: 3 * jnp.roll(x, 1, -1).astype(jnp.bfloat16)  # noqa: E731
    states = integrate(velocity, x1, schedule.time_grid(20, 8.0), method, 5.0, trajectory=True)
    assert states.dtype == jnp.float32
    np.testing.assert_allclose(sphere.norm(states), 5.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.0], "rk4", 1.0), "a sampler is one of .*; got 'rk4'"),
        (([1.0], "rodrigues", 1.0), "T >= 1"),
        (([0.0, 1.0], "rodrigues", 1.0), "must decrease"),
        (([1.0, 0.0], "rodrigues", 0.0), "radius must be positive"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t: x, jnp.ones((1, 1, 2)), *arguments)
