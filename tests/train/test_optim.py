"""AdamW, clipping and schedules against optax and the recorded schedules of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinosae_jax import config as config_lib
from dinosae_jax.train import optim
from dinosae_jax.train import state as state_lib


def make(steps=100, **changes):
    optimizer = config_lib.optimizer_defaults()
    optimizer.update(changes)
    return optim.hyperparameters(optimizer, steps)


@jax.jit
def rates_at(steps, values):
    return jax.vmap(lambda step: optim.learning_rate(step, values))(steps)


def rates(values, count):
    return np.asarray(rates_at(np.arange(count), values))


def test_warm_up_then_cosine_is_the_recorded_schedule(data_dir):
    recorded = np.load(data_dir / "schedules.npz")["lr_stage1_spe10_16ep"]
    values = make(
        160,
        learning_rate=float(recorded.max()),
        warmup_steps=10,
        schedule="cosine",
        final_learning_rate=float(recorded[-1]),
    )
    np.testing.assert_allclose(rates(values, len(recorded)), recorded, rtol=1e-5)


def test_constant_then_linear_is_the_recorded_schedule(data_dir):
    recorded = np.load(data_dir / "schedules.npz")["lr_stage2_spe4"]
    values = make(
        3200,
        learning_rate=2e-4,
        decay_start=160,
        schedule="linear",
        final_learning_rate=2e-5,
    )
    np.testing.assert_allclose(rates(values, len(recorded)), recorded, rtol=1e-5)


def test_moving_average_is_the_recorded_one(data_dir):
    recorded = np.load(data_dir / "schedules.npz")
    ema = {"role": jnp.asarray(recorded["ema0"])}
    update = jax.jit(state_lib.update_ema)
    for model, expected in zip(recorded["ema_models"], recorded["ema_0p9978"], strict=True):
        ema = update(ema, {"role": jnp.asarray(model)}, jnp.float32(0.9978))
        np.testing.assert_allclose(ema["role"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_update_is_optax_adamw(clip_norm):
    rows = np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(2, 3)
    params = {"a": jnp.asarray(rows), "b": jnp.ones(4)}
    values = make(learning_rate=1e-2, weight_decay=0.1, b1=0.5, b2=0.9, clip_norm=clip_norm)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    reference = optax.chain(clip, optax.adamw(1e-2, b1=0.5, b2=0.9, weight_decay=0.1))

    @jax.jit
    def both(step, expected, reference_state, ours, ours_state):
        grads = jax.tree.map(lambda p: jnp.sin(p + step), expected)
        updates, reference_state = reference.update(grads, reference_state, expected)
        norm = optax.tree.norm(grads)
        ours, ours_state = optim.update(grads, ours_state, ours, step, values, norm)
        return optax.apply_updates(expected, updates), reference_state, ours, ours_state

    run = params, reference.init(params), params, optim.init(params)
    for step in range(4):
        run = both(jnp.int32(step), *run)
    expected, _, ours, _ = run
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), ours, expected)
