"""Guided velocities: tangency, formulas, intervals, one network call on interleaved pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.flow import guidance, sphere

NULL = 3
LABELS = jnp.asarray([0, 2, 1, 0])
RNG = np.random.default_rng(0)
X = jax.jit(sphere.project)(RNG.normal(size=(4, 2, 6)).astype(np.float32), 2.0)
TABLE = jnp.asarray(RNG.normal(size=(4, 6)).astype(np.float32))


def network(x, t, labels):
    """A velocity that depends on every input, with a part normal to the sphere."""
    return jnp.sin(x) + sphere.align(t, x) * TABLE[labels][:, None] + x


def weaker(x, t, labels):
    return 0.5 * network(x, t, labels) + TABLE[0]


@jax.jit
def parts(t):
    t = jnp.broadcast_to(jnp.asarray(t), 4)
    labelled = sphere.tangent(X, network(X, t, LABELS))
    null = sphere.tangent(X, network(X, t, jnp.full(4, NULL)))
    return labelled, null, sphere.tangent(X, weaker(X, t, LABELS))


def test_conditional_is_the_network():
    velocity = guidance.conditional(network, LABELS)
    expected = network(X, jnp.full(4, 0.4), LABELS)
    np.testing.assert_allclose(velocity(X, 0.4), expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0.4, (0.1, 0.4, 0.5, 0.9)])
def test_guidance_extrapolates_tangents(t):
    t = jnp.asarray(t)
    labelled, null, weak = parts(t)
    free = jax.jit(guidance.classifier_free(network, LABELS, NULL, 1.5))(X, t)
    auto = jax.jit(guidance.autoguided(network, weaker, LABELS, 1.42))(X, t)
    np.testing.assert_allclose(free, null + 1.5 * (labelled - null), atol=1e-5)
    np.testing.assert_allclose(auto, weak + 1.42 * (labelled - weak), atol=1e-5)
    for guided in (free, auto):
        np.testing.assert_allclose(sphere.dot(X, guided), 0, atol=1e-4)


@pytest.mark.parametrize("kind", ["classifier_free", "autoguided"])
def test_interval_includes_its_ends_and_is_per_example(kind):
    interval = (0.25, 0.75)
    make = {
        "classifier_free": lambda i: guidance.classifier_free(network, LABELS, NULL, 3.0, i),
        "autoguided": lambda i: guidance.autoguided(network, weaker, LABELS, 3.0, i),
    }[kind]
    t = jnp.asarray([0.2, 0.25, 0.75, 0.8])
    everywhere, inside = (np.asarray(jax.jit(make(i))(X, t)) for i in ((0.0, 1.0), interval))
    labelled = np.asarray(parts(t)[0])
    np.testing.assert_array_equal(inside[1:3], everywhere[1:3])
    np.testing.assert_allclose(inside[[0, 3]], labelled[[0, 3]], atol=1e-6)
    assert np.abs(everywhere - labelled).max() > 0.1


def test_one_network_call_of_twice_the_batch():
    shapes = []

    def counted(x, t, labels):
        shapes.append((x.shape, t.shape, labels.shape))
        return network(x, t, labels)

    guidance.classifier_free(counted, LABELS, NULL, 1.5)(X, 0.5)
    assert shapes == [((8, 2, 6), (8,), (8,))]


def test_euclidean_path_keeps_the_whole_vector():
    velocity = guidance.classifier_free(network, LABELS, NULL, 2.0, tangent=lambda x, v: v)
    t = jnp.full(4, 0.5)
    labelled, null = network(X, t, LABELS), network(X, t, jnp.full(4, NULL))
    np.testing.assert_allclose(velocity(X, 0.5), 2 * labelled - null, atol=1e-5)


def test_16_bit_networks_are_combined_in_the_type_of_the_state():
    half = lambda x, t, y: network(x, t, y).astype(jnp.bfloat16)  # noqa: E731
    assert guidance.classifier_free(half, LABELS, NULL, 2.0)(X, 0.5).dtype == jnp.float32
    assert guidance.autoguided(half, half, LABELS, 2.0)(X, 0.5).dtype == jnp.float32
    assert guidance.conditional(half, LABELS)(X, 0.5).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guidance.classifier_free(network, LABELS, None, 2.0), "needs a null label"),
        (lambda: guidance.classifier_free(network, LABELS, NULL, 2.0, (0.9, 0.1)), "0 <= lo <= hi"),
        (lambda: guidance.autoguided(network, weaker, LABELS, 2.0, (-1, 1)), "0 <= lo <= hi"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
