"""The adversarial part of the step, as training calls it, against the recorded discriminator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.losses import adversarial
from dinosae_jax.models.dino_v1 import DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads
from dinosae_jax.train import autoencoder_step, discriminator_step
from dinosae_jax.train import state as state_lib
from tests.models.metrics_weights import flax_variables, group, relative_error, stack_blocks
from tests.models.test_dino_v1 import TINY

TOLERANCE = 2e-5  # float32 logits against those recorded from RAE
CRITICS = discriminator_step.Discriminator(
    DinoV1(**TINY), DiscriminatorHeads(num_heads=4, channels=32)
)
PLAIN = jnp.full((7, 2), 0.5)  # draws with which the augmentation does nothing


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "disc_tiny.npz")


@pytest.fixture(scope="module")
def variables(recording):
    dino = stack_blocks(flax_variables(group(recording, "backbone/"))["params"])
    return {"dino": {"params": dino}, "disc_heads": flax_variables(group(recording, "disc0/"))}


@pytest.fixture(scope="module")
def images(recording):
    """Recorded fakes and reals, [2, 64, 64, 3] in [0, 1]."""
    return {n: (recording[n].transpose(0, 2, 3, 1) + 1.0) / 2.0 for n in ("fake", "real")}


def discriminate(variables, *batches):
    """What one program gives for each of the batches."""
    step = jax.jit(functools.partial(discriminator_step.discriminator_gradients, CRITICS))
    return [step(variables, images["real"], images["fake"], (PLAIN, PLAIN)) for images in batches]


def test_the_discriminators_step_is_the_recorded_one(recording, variables, images, monkeypatch):
    """Loss, gradients and (u, v) after one call on fakes and one on reals, in this order."""
    monkeypatch.setattr(adversarial, "quantise", lambda fakes: fakes)  # the recording's are not
    (found,) = discriminate(variables, images)
    assert relative_error(found.scalars["d_loss"], recording["d_loss_train"]) < TOLERANCE
    for name in ("fake", "real"):
        mean = recording[f"logits_{name}_train"].mean()
        np.testing.assert_allclose(found.scalars[f"d_{name}"], mean, atol=TOLERANCE)
    after = flax_variables(group(recording, "disc_after_train/"))["spectral"]
    errors = jax.tree.map(relative_error, found.spectral, after)
    assert max(jax.tree.leaves(errors)) < TOLERANCE
    expected = flax_variables(group(recording, "grad_dloss/"))["params"]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def check(actual, wanted):
        # A bias before a per-channel norm has gradient 0, which is rounding noise on both sides.
        scale = max(np.abs(wanted).max(), 0.1 * largest)
        assert np.abs(actual - wanted).max() < TOLERANCE * scale

    jax.tree.map(check, found.params, expected)


@pytest.mark.slow
def test_fakes_are_rounded_to_8_bits(variables, images):
    rounded = {**images, "fake": np.round(images["fake"] * 255.0) / np.float32(255.0)}
    plain, again = discriminate(variables, images, rounded)
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_the_generators_pull_is_the_recorded_one(recording, variables, images):
    """The weight is a ratio of norms of the last kernel's gradients, here of features * kernel."""
    kernel, features = jnp.float32(0.5), 2.0 * images["fake"]
    reconstruction_pull = jnp.full_like(features, 1e-3)
    pull = jax.jit(
        functools.partial(
            discriminator_step.generator_loss_and_grad, CRITICS, head=lambda k, f: f * k
        )
    )
    found = pull(
        variables,
        kernel=kernel,
        features=features,
        reconstruction=features * kernel,
        reconstruction_cotangent=reconstruction_pull,
        uniforms=PLAIN,
    )
    assert relative_error(found.loss, recording["g_loss_eval"]) < TOLERANCE
    expected = 2.0 * recording["dgloss_dfake_eval"].transpose(0, 2, 3, 1)  # pixels span 2 there
    assert relative_error(found.cotangent, expected) < TOLERANCE
    norms = [abs(np.vdot(features, pull)) for pull in (reconstruction_pull, expected)]
    np.testing.assert_allclose(found.weight, norms[0] / (norms[1] + 1e-6), rtol=1e-4)


@pytest.mark.slow
def test_every_use_of_the_augmentation_has_its_own_draws(make_config, make_run, monkeypatch):
    used = []
    real = discriminator_step.augment_draws

    def remember(key, constant, index):
        used.append(constant)
        return real(key, constant, index)

    monkeypatch.setattr(discriminator_step, "augment_draws", remember)
    stage, state, frozen, values, batch = make_run(make_config(losses__gan=0.5))
    jax.eval_shape(
        functools.partial(autoencoder_step.gradients, stage, state, frozen, values),
        batch["image"],
        jnp.arange(8),
    )
    assert sorted(used) == [
        state_lib.KEY_AUGMENT_GENERATOR,
        state_lib.KEY_AUGMENT_REAL,
        state_lib.KEY_AUGMENT_FAKE,
    ]
    draws = [real(state.key, constant, jnp.arange(8)) for constant in used]
    assert len(np.unique(draws)) == 3 * 7 * 8


@pytest.mark.slow
def test_the_discriminator_sees_no_latent_noise(make_config, make_run):
    config = make_config(
        trainable=("decoder",),
        losses__cosine=0.0,
        losses__gan=0.5,
        init_from="x",
        latent_noise__tau=0.8,
    )
    stage, state, frozen, values, batch = make_run(config)
    step = jax.jit(functools.partial(autoencoder_step.gradients, stage))

    def scalars(tau):
        noise = {**values["latent_noise"], "tau": jnp.float32(tau)}
        numbers = {**values, "latent_noise": noise}
        return step(state, frozen, numbers, batch["image"], jnp.arange(8)).scalars

    noisy, clean = scalars(0.8), scalars(0.0)
    for name in ("d_loss", "d_fake", "d_real"):
        np.testing.assert_allclose(noisy[name], clean[name], rtol=1e-6)
    for name in ("psnr", "gan"):
        assert abs(noisy[name] - clean[name]) > 1e-4 * abs(clean[name]), name
