"""The autoencoder's step: gradient paths, accumulation, guards, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.losses import adversarial
from dinosae_jax.runtime import sharding
from dinosae_jax.train import autoencoder_step, discriminator_step
from dinosae_jax.train import state as state_lib
from dinosae_jax.train.jit_step import jit_step

GAN = {"losses__gan": 0.5, "optimizer__learning_rate": 5e-4}  # the rate of stages 2-4, tiny
DECODER_ONLY = {"trainable": ("decoder",), "losses__cosine": 0.0, "init_from": "x"}
NOISY = {**DECODER_ONLY, "latent_noise__tau": 0.8}
STAGES = {"1": {}, "2": GAN, "3": {**DECODER_ONLY, **GAN}, "4": {**NOISY, **GAN}}


def in_ci(*slow, fast):
    """Stages to run: `fast` always, the others with `-m slow`."""
    return [fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def new_step_of(stage):
    return jax.jit(functools.partial(autoencoder_step.train_step, stage))


step_of = functools.cache(new_step_of)


def leaves_equal(a, b):
    return [
        bool(np.array_equal(x, y, equal_nan=True))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


@pytest.fixture(scope="module")
def after_one(make_config, make_run):
    """Name of a stage -> (state before, state after one step, stage)."""

    @functools.cache
    def run(name):
        stage, state, frozen, values, batch = make_run(make_config(**STAGES[name]))
        return state, step_of(stage)(state, frozen, batch, values), stage

    return run


@pytest.mark.parametrize("name", in_ci("2", "3", "4", fast="1"))
def test_exactly_the_stages_roles_change(after_one, name):
    before, after, stage = after_one(name)
    expected = {*stage.trainable} | ({"disc_heads"} if stage.discriminator else set())
    assert set(after.params) == expected
    for role in expected:
        assert not all(leaves_equal(before.params[role], after.params[role])), role
    assert set(after.ema) == set(stage.trainable)
    assert int(after.step) == 1
    assert int(after.skipped) == 0
    assert all(np.isfinite(float(mean.compute())) for mean in after.metrics.values())


@pytest.fixture(scope="module")
def gradients(make_config, make_run):
    """Weight of the cosine loss -> gradients of the first stage at step 0."""

    @functools.cache
    def of(cosine):
        stage, state, frozen, values, batch = make_run(make_config(losses__cosine=cosine))
        one = functools.partial(autoencoder_step.gradients, stage, state, frozen, values)
        return jax.jit(one)(batch["image"], jnp.arange(8)).params

    return of


def test_the_alignment_reaches_the_stem_through_the_frozen_vit(gradients):
    with_cosine, without = gradients(0.5), gradients(0.0)
    assert not all(leaves_equal(with_cosine["stem"], without["stem"]))
    assert all(
        np.allclose(a, b, rtol=1e-4, atol=1e-7)
        for a, b in zip(
            jax.tree.leaves(with_cosine["decoder"]),
            jax.tree.leaves(without["decoder"]),
            strict=True,
        )
    )


def test_gradients_are_those_of_the_plain_loss(make_config, make_run, gradients):
    """The two-part pull-back equals jax.grad of the weighted sum of the terms."""
    from dinosae_jax.losses import alignment, reconstruction
    from dinosae_jax.models import autoencoder

    stage, state, frozen, _, batch = make_run(make_config(losses__cosine=0.5))
    image = batch["image"].astype(np.float32) / 255.0

    def loss(params):
        variables = {**frozen, **autoencoder_step.merge(params, state.extra)}
        code = autoencoder.encode(stage.modules, variables, image)
        teacher = autoencoder.encode_teacher(stage.modules, variables, image)
        picture = autoencoder.decode(stage.modules, variables, code.tokens, code.grid)
        return reconstruction.l1(picture, image) + 0.5 * alignment.cosine(
            code.tokens, teacher.tokens
        )

    expected = jax.jit(jax.grad(loss))(state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        gradients(0.5),
        expected,
    )


@pytest.fixture
def no_rounding(monkeypatch):
    """Fakes are not rounded to 8 bits.

    Where a difference of 1e-7 crosses a boundary of the rounding, a pixel of a fake changes by
    1/255; the sums themselves are compared without that step.
    """
    monkeypatch.setattr(adversarial, "quantise", lambda fakes: jnp.clip(fakes, 0.0, 1.0))


@pytest.mark.slow  # in the fast suite: of the flow's step, which accumulates by the same function
@pytest.mark.parametrize("name", ["1", "2", "4"])
def test_accumulation_equals_the_large_batch(make_config, make_run, no_rounding, name):
    """Losses, adaptive weight, gradients and spectral vectors; draws follow the global index."""

    def run(accumulation):
        config = make_config(**STAGES[name], accumulation=accumulation)
        stage, state, frozen, values, batch = make_run(config)
        return new_step_of(stage)(state, frozen, batch, values)

    whole, parts = run(1), run(4)
    for metric, mean in whole.metrics.items():
        expected = pytest.approx(float(mean.compute()), rel=1e-5, abs=1e-6)
        assert float(parts.metrics[metric].compute()) == expected, metric
    # AdamW's first step is the sign of the gradient: compare the moments.
    for optimizer, moments in whole.opt.items():
        expected, found = (jax.tree.leaves(m.mu) for m in (moments, parts.opt[optimizer]))
        largest = max(np.abs(leaf).max() for leaf in expected)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)
    for a, b in zip(jax.tree.leaves(parts.extra), jax.tree.leaves(whole.extra), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", in_ci("2", fast="1"))
def test_a_step_that_is_not_finite_changes_nothing(make_config, make_run, name):
    stage, state, frozen, values, batch = make_run(make_config(**STAGES[name]))
    values["losses"]["l1"] = jnp.float32(jnp.nan)
    step = step_of(stage)
    after = step(step(state, frozen, batch, values), frozen, batch, values)
    for field in ("params", "opt", "ema", "extra", "metrics"):
        assert all(leaves_equal(getattr(state, field), getattr(after, field))), field
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 2, 2)
    values["losses"]["l1"] = jnp.float32(1.0)
    recovered = step(after, frozen, batch, values)
    assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (2, 0)
    assert not all(leaves_equal(after.params, recovered.params))


@pytest.mark.slow
def test_a_discriminator_that_is_not_finite_changes_nothing(make_config, make_run):
    """Not the generator either, before it listens to the discriminator at all."""
    stage, state, frozen, values, batch = make_run(make_config(**GAN, gan__start=2))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params["disc_heads"])
    state = state.replace(params={**state.params, "disc_heads": broken})
    after = step_of(stage)(state, frozen, batch, values)
    assert all(leaves_equal(state.params, after.params)) and all(leaves_equal(state.ema, after.ema))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)


@pytest.mark.slow
def test_the_discriminator_waits_for_its_start(make_config, make_run):
    config = make_config(**GAN, gan__start=2, gan__disc_start=1)
    stage, state, frozen, values, batch = make_run(config)
    step = step_of(stage)
    first = step(state, frozen, batch, values)
    assert all(leaves_equal(state.params["disc_heads"], first.params["disc_heads"]))
    assert all(leaves_equal(state.extra["disc_heads"], first.extra["disc_heads"]))
    second = step(first, frozen, batch, values)
    assert not all(leaves_equal(first.params["disc_heads"], second.params["disc_heads"]))
    # Before gan.start the generator is trained by its other losses alone.
    loss = float(first.metrics["l1"].compute()) + 0.5 * float(first.metrics["cosine"].compute())
    assert float(first.metrics["loss"].compute()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow  # in the fast suite: of the flow's step, which is placed by the same rules
@pytest.mark.parametrize("name", ["1", "2", "4"])
def test_one_and_eight_devices_agree(make_config, make_run, no_rounding, name):
    # Of eight seeds one or two put an activation so near the kink of a ReLU that rounding moves it
    # across, which changes the GAN's weight by 1e-3; this one does not.
    stage, state, frozen, values, batch = make_run(make_config(**STAGES[name]), seed=2)
    curves = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(1, jax.devices()[:devices])
        place = functools.partial(jax.device_put, device=sharding.replicated(mesh))
        step = jit_step.__wrapped__(
            autoencoder_step.train_step, stage, mesh
        )  # not the cache: see quantise
        current, fixed = place(jax.tree.map(np.asarray, (state, frozen)))
        on_devices = sharding.put_batch(batch, mesh)
        for _ in range(3):
            current = step(current, fixed, on_devices, values)
        curves.append({n: float(m.compute()) for n, m in current.metrics.items()})
    for metric, value in curves[0].items():
        # AdamW's first steps are as long for a gradient near 0 as for any other.
        rel, scale = (2e-5, 1e-6) if metric in discriminator_step.METRICS else (1e-5, 1e-7)
        assert curves[1][metric] == pytest.approx(value, rel=rel, abs=scale), metric


def test_latent_noise_is_per_image_and_ramps(make_config, make_run):
    state = make_run(make_config(**NOISY))[1]
    noise = {"tau": jnp.float32(0.8), "tau_end": jnp.float32(1.2), "ramp_steps": jnp.float32(10)}

    @jax.jit
    def add(step, index, noise):
        at = state.replace(step=step)
        return autoencoder_step.add_latent_noise(jnp.zeros((len(index), 40, 32)), at, noise, index)

    def draw(step, index, noise=noise):
        return np.asarray(add(jnp.int32(step), jnp.array(index), noise))

    first = draw(0, [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(first[2:4], draw(0, [2, 3]))  # the place decides, not the batch
    sigma = np.std(first, axis=(1, 2))
    assert np.all(sigma < 0.8 * 1.1)
    assert len(np.unique(sigma.round(4))) == 6
    late, later = draw(10, range(6)), draw(20, range(6))
    ratio = np.std(late, axis=(1, 2)).max()
    assert ratio > 0.0
    assert not np.array_equal(late, later)
    flat = {**noise, "ramp_steps": jnp.float32(0)}
    constant, ramped = draw(5, range(6), flat), draw(5, range(6))
    np.testing.assert_allclose(ramped, constant * (1.0 / 0.8), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "2", "4"])
def test_the_state_is_donated_and_nothing_recompiles(make_config, make_run, name):
    stage, state, frozen, values, batch = make_run(make_config(**STAGES[name]))
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    place = functools.partial(jax.device_put, device=sharding.replicated(mesh))
    state, frozen = place(jax.tree.map(np.asarray, (state, frozen)))
    on_devices = sharding.put_batch(batch, mesh)
    step = jit_step(autoencoder_step.train_step, stage, mesh)
    memory = step.lower(state, frozen, on_devices, values).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size
    for _ in range(3):
        state = step(state, frozen, on_devices, values)
        zeros = state_lib.zero_metrics(stage.metric_names)  # as the loop does after a line
        state = state.replace(metrics=sharding.replicate(zeros, mesh))
    assert step._cache_size() == 1


def temporary_bytes(make_config, make_run, depth, **changes):
    config = make_config(model__vit__depth=depth, model__vit__scan_layers=False, **changes)
    stage, state, frozen, values, batch = make_run(config)
    compiled = step_of(stage).lower(state, frozen, batch, values).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_frozen_encoder_keeps_no_activations(make_config, make_run):
    """Four more blocks cost memory where gradients pass through the ViT, and only there."""
    growth = {}
    for name in ("1", "4"):  # stage 4 is stage 3 with noise
        changes = {**STAGES[name], "losses__gan": 0.0}
        shallow, deep = (
            temporary_bytes(make_config, make_run, depth, **changes) for depth in (1, 5)
        )
        growth[name] = (deep - shallow) / 4
    tokens = 8 * (1 + 2 + 4) * 32 * 4  # one residual stream: batch, tokens, width, bytes
    assert growth["1"] > 4 * tokens
    assert growth["4"] < tokens
