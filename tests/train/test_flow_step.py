"""The flow's step learns, accumulates, survives bad steps and ignores the number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rfm_ddt, rfm_dit
from dinosae_jax.flow import matching
from dinosae_jax.models import autoencoder, registry
from dinosae_jax.runtime import jit, sharding
from dinosae_jax.train import flow_evaluation, flow_step, flow_task
from dinosae_jax.train.jit_step import jit_step

BATCH = 16


def small_config(**changes):
    config = rfm_dit.get_config("tiny")
    config.dtype = "float32"
    config.batch_size = BATCH
    config.model.dit.update({"hidden_size": 64, "depth": 1, "num_heads": 2})
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def initial(stage):
    drawn = jit.jit_once(functools.partial(registry.init_dit, stage.dit))(jax.random.PRNGKey(0))
    return jax.device_get(drawn)


def batch_of(seed=0):
    """One direction for each token, a little scattered: latents that are learnt quickly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(BATCH, dtype=np.int32) % 10
    centre = np.random.default_rng(9).normal(size=(16, 64))
    latents = centre + 0.1 * rng.normal(size=(BATCH, 16, 64))
    return {"latent": latents.astype(np.float32), "label": labels}


def run(config, batches, devices=1):
    """The states' metrics after each batch, and the last state."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    stage = flow_task.step_spec(config)
    step = jit_step(flow_step.train_step, stage, mesh)
    values = flow_step.hyperparameters(config)
    create = functools.partial(flow_step.create_state, stage, seed=0)
    place = {"out_shardings": sharding.replicated(mesh)}
    state = jit.jit_once(create, **place)({"dit": initial(stage)})
    history = []
    with jax.set_mesh(mesh):
        for batch in batches:
            before = {n: float(m.total) for n, m in state.metrics.items()}
            state = step(state, {}, sharding.put_batch(batch, mesh), values)
            history.append({n: float(m.total) - before[n] for n, m in state.metrics.items()})
    return history, jax.device_get(state)


def largest_difference(ours, theirs):
    """Largest difference of two trees, relative to the largest value of each leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in pairs if a.size)


def test_the_loss_falls():
    history, state = run(small_config(), [batch_of(seed) for seed in range(60)])
    # At the zero-initialised output the loss is the mean square angle, pi^2/4 and a little more.
    assert history[0]["loss"] == pytest.approx(np.pi**2 / 4, rel=0.05)
    assert np.mean([line["loss"] for line in history[-5:]]) < 0.7 * history[0]["loss"]
    assert int(state.step) == 60
    assert int(state.skipped) == 0


def test_accumulation_equals_one_large_batch():
    whole, first = run(small_config(), [batch_of()])
    parts, second = run(small_config(accumulation=4), [batch_of()])
    for name in ("loss", "grad_norm"):
        assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-5)
    # The first moment is 0.1 of the gradient; sums of 16 terms in two orders agree to rounding.
    assert largest_difference(second.opt["dit"].mu, first.opt["dit"].mu) < 1e-4


def test_one_and_eight_devices_agree_over_three_steps():
    batches = [batch_of(seed) for seed in range(3)]
    one, _ = run(small_config(), batches)
    eight, _ = run(small_config(), batches, devices=8)
    for ours, theirs in zip(eight, one, strict=True):
        for name in ("loss", "tangential", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    bad = batch_of(1)
    bad["latent"][3, 2, 1] = np.nan
    _, before = run(small_config(), [batch_of()])
    _, after = run(small_config(), [batch_of(), bad])
    for field in ("params", "ema", "opt"):
        assert jax.tree.all(
            jax.tree.map(np.array_equal, getattr(after, field), getattr(before, field))
        )
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)


def test_images_and_their_latents_are_one_path():
    config = small_config()
    stage = flow_task.step_spec(config)
    init = functools.partial(autoencoder.init, stage.modules, image_size=64)
    frozen = jit.jit_once(init)(jax.random.PRNGKey(1))
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    encode = jit.jit_once(functools.partial(flow_step.flow_data, stage))
    points = encode(frozen, {"image": image})
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 8.0, rtol=1e-5)
    # Placed again as latents of any norm, they are the same points.
    np.testing.assert_allclose(encode({}, {"latent": 1.7 * points}), points, atol=1e-5)


def draw_of(stage):
    """Draws for latents [n,16,64], compiled."""
    return jax.jit(
        lambda key, index, labels, max_time: flow_step.draw(
            stage, key, index, labels, (16, 64), max_time
        )
    )


def test_draws_follow_the_place_in_the_global_batch():
    stage = flow_task.step_spec(small_config())
    key, labels = jax.random.PRNGKey(3), jnp.arange(8) % 10
    draw = draw_of(stage)
    whole = draw(key, jnp.arange(8), labels, jnp.float32(0.5))
    part = draw(key, jnp.arange(5, 8), labels[5:], jnp.float32(0.5))
    # The random bits are the same; norms are summed in an order that depends on the shape.
    for ours, theirs in zip(part, whole, strict=True):
        np.testing.assert_allclose(ours, theirs[5:], rtol=1e-6)
    np.testing.assert_array_equal(part.label, whole.label[5:])
    assert set(np.asarray(whole.label)) <= {*range(10)} | {10}
    assert 10 in np.asarray(whole.label)


def test_example_losses_average_to_the_training_loss():
    stage = flow_task.step_spec(small_config())
    rng = np.random.default_rng(2)
    # The zero-initialised output layer would hide the network.
    variables = jax.tree.map(
        lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), initial(stage)
    )
    batch, key, index = batch_of(), jax.random.PRNGKey(4), jnp.arange(BATCH)
    each = jax.jit(functools.partial(flow_evaluation.example_losses, stage))(
        {"dit": variables}, batch, index, key, jnp.float32(0.1)
    )
    draws = draw_of(stage)(key, index, batch["label"], jnp.float32(0.0))
    path = matching.make_path(stage.path, stage.radius)

    @jax.jit
    def loss(variables, latent):
        predict = lambda x, t: stage.dit.apply(variables, x, t, draws.label)  # noqa: E731
        placed = path.place(latent)
        return matching.loss(predict, path, placed, draws.noise, draws.time, radial_weight=0.1)

    whole = loss(variables, batch["latent"])
    assert float(whole["radial"]) > 0
    for name in flow_evaluation.LOSSES:
        assert float(np.mean(each[name])) == pytest.approx(float(whole[name]), rel=1e-5)


def test_position_table_and_frequencies_stay_and_have_no_optimizer_state():
    _, state = run(small_config(**{"optimizer.weight_decay": 0.1}), [batch_of(), batch_of(1)])
    start = initial(flow_task.step_spec(small_config()))["params"]
    _, bases = flow_step.split_bases(start)
    assert set(bases) == {"pos_embed", "t_embedder"}
    for tree in (state.params["dit"], state.ema["dit"]):
        assert jax.tree.all(jax.tree.map(np.array_equal, flow_step.split_bases(tree)[1], bases))
    assert "pos_embed" not in state.opt["dit"].mu
    assert not np.array_equal(
        state.params["dit"]["x_embedder"]["proj"]["kernel"], start["x_embedder"]["proj"]["kernel"]
    )


@pytest.mark.parametrize(("module", "trainable"), [(rfm_dit, 677_543_296), (rfm_ddt, 839_724_372)])
def test_trainable_parameters_of_the_published_sizes(module, trainable):
    network = registry.build("dit", module.get_config().model.dit.to_dict())
    shapes = jax.eval_shape(functools.partial(registry.init_dit, network), jax.random.PRNGKey(0))
    trained, _ = flow_step.split_bases(shapes["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == trainable
