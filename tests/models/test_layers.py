"""Gradients of layers under bfloat16: summed and handed on in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import layers


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_linear_layer_is_the_plain_product(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), dtype)
    kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (6,)))

    def plain(x, kernel, bias):
        return x @ kernel.astype(dtype) + bias.astype(dtype)

    want, pull_want = jax.vjp(plain, x, kernel, bias)
    got, pull = jax.vjp(lambda *a: layers.linear(*a, None), x, kernel, bias)
    np.testing.assert_array_equal(got, want)
    dy = jnp.asarray(rng.normal(size=want.shape), dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else 0.03
    for ours, theirs in zip(pull(dy), pull_want(dy), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (ours, theirs)), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (7, 2, 3), (3, 2, 1), (4, 4, 0)]
)
def test_a_convolution_has_the_gradients_of_jax(size, stride, padding):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 9, 12, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 4, 6)), jnp.float32)
    plain = lambda x, k: layers._convolve(x, k, stride, padding, 1)  # noqa: E731
    want, pull_want = jax.vjp(plain, x, kernel)
    got, pull = jax.vjp(lambda x, k: layers.convolve(x, k, stride, padding), x, kernel)
    np.testing.assert_array_equal(got, want)
    dy = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    for ours, theirs in zip(pull(dy), pull_want(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def bias_error(layer):
    """Relative error of the bias's gradient of a bfloat16 layer, against float64."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(4, 64, 64, 8)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    # Of one sign mostly, so that rounding shows: a running bfloat16 sum would lose small terms.
    dy = jnp.asarray(rng.normal(size=(4, 64, 64, 8)) + 0.5, jnp.bfloat16)
    _, pull = jax.vjp(lambda v: layer.apply(v, x), variables)
    grads = pull(dy)[0]["params"]
    got = np.asarray(grads["bias"], np.float64)
    want = np.asarray(dy, np.float64).sum((0, 1, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    return np.abs(got / want - 1).max()


@pytest.mark.parametrize(
    "layer", [layers.Dense(8, dtype=jnp.bfloat16), layers.Conv2d(8, dtype=jnp.bfloat16)]
)
def test_biases_are_summed_in_float32(layer):
    assert bias_error(layer) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dense(8, dtype=jnp.bfloat16),
        layers.Conv2d(8, dtype=jnp.bfloat16),
        layers.PatchProjection(8, 2, jnp.bfloat16),
    ],
)
def test_no_gradient_of_parameters_is_rounded_to_bfloat16(layer):
    """On the jaxpr: what reaches the parameters comes from a float32 product or sum."""
    x = jnp.zeros((2, 4, 4, 8))
    variables = layer.init(jax.random.key(0), x)

    def loss(variables):
        return layer.apply(variables, x).astype(jnp.float32).sum()

    text = jax.make_jaxpr(jax.grad(loss))(variables)
    produced = {}
    for equation in text.eqns:
        for out in equation.outvars:
            produced[out] = equation
    for out in text.jaxpr.outvars:
        equation = produced[out]
        while equation.primitive.name in ("reshape", "transpose", "slice", "squeeze"):
            equation = produced[equation.invars[0]]
        assert equation.primitive.name in ("dot_general", "conv_general_dilated", "reduce_sum")
        assert equation.outvars[0].aval.dtype == jnp.float32
