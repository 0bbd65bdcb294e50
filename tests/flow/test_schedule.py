"""Times against the recorded transport: shift, grids, training distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.flow import matching, schedule

DIMENSIONS = [4096, 196608, 262144, 786432]


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_recorded_shift_and_grids(load, dimension):
    recorded = load("schedules")
    shift = schedule.dimension_shift(dimension // 256, 256)
    assert shift == pytest.approx(float(recorded[f"shift_dim{dimension}"]), rel=1e-15)
    for steps in (2, 5, 50, 250):
        grid = schedule.time_grid(steps, shift)
        expected = recorded[f"to_zero_grid_dim{dimension}_N{steps}"]
        np.testing.assert_allclose(grid, expected, rtol=0, atol=1e-14)
        # RAE's n points are n-1 updates that stop short of 0; recorded in float32
        short = schedule.shift_time(1 - np.linspace(0, 0.999, steps), shift)
        expected = recorded[f"rae_grid_dim{dimension}_num{steps}"]
        np.testing.assert_allclose(short, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform", {"distribution": "uniform"}),
        ("logit-normal_0_1", {}),
        ("logit-normal_-0.5_1.2", {"mu": -0.5, "sigma": 1.2}),
    ],
)
def test_recorded_training_times(load, dimension, name, options):
    recorded = load("schedules")
    u = recorded["train_uniform_draw_u"]
    shift = schedule.dimension_shift(dimension // 256, 256)
    t = schedule.training_times(jnp.asarray(u), shift=shift, **options)
    assert t.dtype == jnp.float32
    error = np.abs(t - recorded[f"train_t_dim{dimension}_{name}"])
    # the recorded times come from another float32 normal quantile function
    assert np.all(error <= np.where((u >= 0.01) & (u <= 0.99), 1e-5, 5e-4)), error.max()


@pytest.mark.parametrize(("count", "name", "shift"), [(50, "0.0", 1.0), (250, "0.3", 1 / 0.3)])
def test_lightningdit_grid_is_the_same_shift_in_reversed_time(load, count, name, shift):
    recorded = load("schedules")[f"lightningdit_grid_num{count}_shift{name}"]
    ours = schedule.shift_time(1 - np.linspace(0, 1, count), shift)
    np.testing.assert_allclose(1 - recorded, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 6.928203230275509, 8.0, 13.3])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_grid_runs_from_one_to_zero(steps, shift):
    grid = schedule.time_grid(steps, shift)
    assert (len(grid), grid[0], grid[-1]) == (steps + 1, 1.0, 0.0)
    assert np.all(np.diff(grid) < 0)


def test_shift_is_at_least_one():
    assert schedule.dimension_shift(256, 1024) == 8
    assert schedule.dimension_shift(16, 64) == 1


def test_truncation_bounds_the_times():
    u = jnp.asarray([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
    assert schedule.training_times(u, max_time=0.9)[-1] <= 0.9
    assert schedule.training_times(u, max_time=1.0)[1] == pytest.approx(0.5)
    assert np.all(np.isfinite(schedule.training_times(u, max_time=1.0)))


def test_draws_have_the_distribution_and_belong_to_the_example():
    keys = matching.example_keys(jax.random.key(0), jnp.arange(4000))
    t = np.asarray(schedule.draw_times(keys, shift=8.0))
    # quantiles of the shifted logit-normal; four standard errors of the median are below 0.01
    quantiles = np.quantile(t, [0.05, 0.5, 0.95])
    np.testing.assert_allclose(quantiles, [0.607, 0.889, 0.976], atol=0.015)
    np.testing.assert_array_equal(schedule.draw_times(keys[100:], shift=8.0), t[100:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.time_grid(0), "at least 1 step; got steps=0"),
        (lambda: schedule.time_grid(5, 0.0), "shift must be positive"),
        (
            lambda: schedule.training_times(jnp.ones(1), "cosine"),
            "a time distribution is one of",
        ),
        (lambda: schedule.training_times(jnp.ones(1), sigma=0.0), "sigma must be positive"),
        (lambda: schedule.training_times(jnp.ones(1), max_time=1.5), "max_time must be in"),
        (lambda: schedule.training_times(jnp.ones(1), shift=-1.0), "shift must be positive"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
