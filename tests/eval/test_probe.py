"""The linear probe: its update against a head trained alone, and that it learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinosae_jax.eval import probe

CLASSES, WIDTH = 8, 16


def data(count, seed=0):
    """Features around one centre a class, and the classes."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    labels = generator.integers(0, CLASSES, count)
    features = centres[labels] + 0.3 * generator.normal(size=(count, WIDTH))
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32)


def test_each_head_trains_as_if_alone():
    steps, batch_size, index = 5, 32, 10
    heads = probe.init_heads(jax.random.key(0), WIDTH, CLASSES)
    alone = (heads["kernel"][index], heads["bias"][index])
    rate = probe.LEARNING_RATES[index] * batch_size / 256
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
    state = optimizer.init(alone)

    @jax.jit
    def update(alone, state, features, labels):
        def loss(params):
            scores = features @ params[0] + params[1]
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(alone), state)
        return optax.apply_updates(alone, updates), state

    batches = [data(batch_size, seed) for seed in range(steps)]
    for batch in batches:
        alone, state = update(alone, state, *batch)
    heads = probe.train_probe(heads, batches, batch_size, steps)
    np.testing.assert_allclose(heads["kernel"][index], alone[0], atol=1e-6)
    np.testing.assert_allclose(heads["bias"][index], alone[1], atol=1e-6)


def test_separable_classes_are_learned_by_some_rate():
    heads = probe.init_heads(jax.random.key(0), WIDTH, CLASSES)
    heads = probe.train_probe(heads, itertools.repeat(data(256)), 256, steps=60)
    held_out = data(200, seed=1)
    accuracy = probe.evaluate_probe(heads, [held_out])
    assert accuracy.count == 200
    assert accuracy.top1[accuracy.best] > 0.95
    assert accuracy.top1[0] < accuracy.top1[accuracy.best]
    assert np.all(accuracy.top5 >= accuracy.top1)
    halves = [(held_out[0][part], held_out[1][part]) for part in (slice(70), slice(70, None))]
    np.testing.assert_array_equal(probe.evaluate_probe(heads, halves).top1, accuracy.top1)


def test_features_are_the_class_token_beside_the_mean_patch():
    patches = jnp.stack([jnp.full((1, 4), 1.0), jnp.full((1, 4), 3.0)], axis=1)
    features = probe.probe_features(jnp.full((1, 4), 5.0, jnp.bfloat16), patches)
    np.testing.assert_array_equal(features, [[5.0] * 4 + [2.0] * 4])
    assert features.dtype == jnp.float32


def test_initialisation_follows_the_protocol():
    heads = probe.init_heads(jax.random.key(0), 256, 100)
    assert heads["kernel"].shape == (13, 256, 100)
    np.testing.assert_allclose(jnp.std(heads["kernel"]), 0.01, rtol=0.01)
    assert not np.any(heads["bias"])


def test_bad_input_is_one_clear_line():
    heads = probe.init_heads(jax.random.key(0), WIDTH, CLASSES)
    with pytest.raises(ValueError, match="at least 1 step; got 0"):
        probe.train_probe(heads, [], 32, steps=0)
    with pytest.raises(ValueError, match="of 3 steps needs as many batches; got 0"):
        probe.train_probe(heads, [], 32, steps=3)
    with pytest.raises(ValueError, match="at least 1 image"):
        probe.evaluate_probe(heads, [])


def test_a_classifier_keeps_the_best_rate_and_scales_its_features():
    known, labels = (np.asarray(each) for each in data(400))
    held_out, truth = (np.asarray(each) for each in data(200, seed=1))
    scale, shift = np.linspace(0.01, 100, WIDTH, dtype=np.float32), np.float32(50)
    classify = probe.fit_classifier(known, labels, held_out, truth, steps=100, batch_size=64)
    moved = probe.fit_classifier(
        known * scale + shift, labels, held_out * scale + shift, truth, steps=100, batch_size=64
    )
    assert np.mean(classify(held_out) == truth) > 0.95
    assert np.mean(moved(held_out * scale + shift) == classify(held_out)) > 0.98
    shuffled = np.random.default_rng(0).permutation(labels)
    blind = probe.fit_classifier(known, shuffled, held_out, truth, steps=100, batch_size=64)
    assert np.mean(blind(held_out) == truth) < 0.5


def test_nearest_neighbours_vote_by_cosine():
    known = np.asarray([[1, 0], [2, 0.1], [3, -0.1], [0, 1], [0.1, 5], [-1, -1]], np.float32)
    labels = np.asarray([0, 0, 1, 1, 1, 2])
    asked = np.asarray([[10, 0.2], [0.001, 0.01], [-5, -4]], np.float32)
    assert probe.nearest_neighbours(known, labels, asked, neighbours=1).tolist() == [0, 1, 2]
    assert probe.nearest_neighbours(known, labels, asked, neighbours=3).tolist() == [0, 1, 1]
