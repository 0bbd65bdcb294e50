"""Adversarial losses, adaptive weight and quantiser against recorded values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.losses.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer_adaptive_weight,
    quantise,
)

RTOL = 1e-6  # closed-form expressions in float32


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "losses.npz")


def test_hinge_losses_and_gradients_equal_recorded(recording):
    real, fake = recording["logits_real"], recording["logits_fake"]
    both = jax.jit(jax.value_and_grad(discriminator_loss, argnums=(0, 1)))
    loss, gradients = both(real, fake)
    np.testing.assert_allclose(loss, recording["hinge_d_loss_mean"], rtol=RTOL)
    np.testing.assert_allclose(gradients[0], recording["hinge_grad_real"], rtol=RTOL)
    np.testing.assert_allclose(gradients[1], recording["hinge_grad_fake"], rtol=RTOL)
    np.testing.assert_allclose(generator_loss(fake), recording["vanilla_g_loss_mean"], rtol=RTOL)


def test_zero_logits_cost_one():
    zeros = jnp.zeros((2, 5), jnp.bfloat16)
    loss = discriminator_loss(zeros, zeros)
    assert loss == 1.0 and loss.dtype == jnp.float32


def test_adaptive_weight_equals_recorded(recording):
    """With reconstruction h W^T, L1 against a target, adversarial -scale * mean(tanh(rec A))."""
    W, h, target, A = (recording[f"aw_{name}"] for name in ("W", "h", "target", "A"))
    head_fn = lambda kernel, features: features @ kernel.T  # noqa: E731
    l1_fn = lambda pixels: jnp.abs(pixels - target).mean()  # noqa: E731

    @jax.jit
    def weigh(scale, maximum):
        gan_fn = lambda pixels: -scale * jnp.tanh(pixels @ A).mean()  # noqa: E731
        l1, grad_l1 = jax.value_and_grad(l1_fn)(head_fn(W, h))
        gan, grad_gan = jax.value_and_grad(gan_fn)(head_fn(W, h))
        weight = last_layer_adaptive_weight(head_fn, W, h, grad_l1, grad_gan, maximum)
        return weight, l1 + 0.75 * weight * gan

    for i, (scale, maximum) in enumerate(recording["aw_scale_max"]):
        weight, total = weigh(scale, maximum)
        np.testing.assert_allclose(weight, recording["aw_dweight"][i], rtol=2e-6)
        np.testing.assert_allclose(total, recording["aw_total_dw0p75"][i], rtol=2e-6)


def test_adaptive_weight_saturates_and_is_a_constant():
    assert adaptive_weight(jnp.float32(3.0), jnp.float32(0.0)) == 1e4
    np.testing.assert_allclose(adaptive_weight(jnp.float32(3.0), jnp.float32(1.5)), 2.0, rtol=RTOL)
    assert jax.grad(adaptive_weight)(3.0, 1.5) == 0


def test_quantiser_equals_recorded(recording):
    quantised = 2.0 * quantise((recording["disc_in"] + 1.0) / 2.0) - 1.0
    np.testing.assert_allclose(quantised, recording["disc_quantised"], atol=RTOL)


def test_quantiser_stops_the_gradient_and_keeps_bytes():
    levels = jnp.arange(256) / 255.0
    np.testing.assert_array_equal(quantise(levels), levels)
    np.testing.assert_array_equal(quantise(np.float32([-0.2, 1.3])), [0.0, 1.0])
    gradient = jax.jit(jax.grad(lambda x: quantise(x).sum()))(levels)
    np.testing.assert_array_equal(gradient, 0)
