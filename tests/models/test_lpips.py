"""LPIPS against recorded values of the published implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.lpips import LPIPS, STAGES, unit_normalise
from tests.models.metrics_weights import flax_variables, group, relative_error, seeded_state

TOLERANCE = 1e-5  # float32 against distances recorded from lpips


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "lpips.npz")


@pytest.fixture(scope="module")
def params(recording):
    """The published channel weights behind a VGG16 with the recording's seeded weights."""
    shapes, inputs = [], 3
    for outputs in [features for stage in STAGES for _, features in stage]:
        shapes += [(outputs, inputs, 3, 3), (outputs,)]
        inputs = outputs
    kind_of = lambda name: 2.0 if name.endswith("weight") else "bias"  # noqa: E731
    trunk = seeded_state(recording["vgg_keys"], shapes, kind_of, recording["vgg_crc"])
    return flax_variables({**trunk, **group(recording, "lin/")})["params"]


@pytest.fixture(scope="module")
def images(recording):
    return [recording[f"img_{name}"] / np.float32(255) for name in "ab"]


@pytest.fixture(scope="module")
def features(params, images):
    return [extract(params, x) for x in images]


@jax.jit
def extract(params, images):
    return LPIPS().apply({"params": params}, images, method="features")


@jax.jit
def value_and_image_gradient(params, a, b):
    """((mean distance, distances [b]), gradient of the mean with respect to b)."""

    def loss_fn(b):
        distances = LPIPS().apply({"params": params}, a, b)
        return distances.mean(), distances

    return jax.value_and_grad(loss_fn, has_aux=True)(b)


@jax.jit
def compare(params, features_a, features_b):
    return LPIPS().apply({"params": params}, features_a, features_b, method="per_layer")


def test_channel_weights_on_recorded_features(recording, params):
    taps = [[recording[f"feat{k}/{j}"].transpose(0, 2, 3, 1) for j in range(5)] for k in range(2)]
    distances = compare(params, *taps)
    for j in range(5):
        expected = recording[f"head_perlayer/{j}"][:, 0, 0, 0]
        assert relative_error(distances[:, j], expected) < TOLERANCE
    assert relative_error(distances.sum(-1), recording["head_value"][:, 0, 0, 0]) < TOLERANCE


def test_features_equal_recorded(recording, features):
    for j in range(5):
        tap = features[0][j]
        patch = tap[:, :4, :4, :8].transpose(0, 3, 1, 2)
        assert relative_error(tap.mean((1, 2)), recording[f"full_feat_mean/{j}"]) < TOLERANCE
        assert relative_error(patch, recording[f"full_feat_patch/{j}"]) < TOLERANCE


def test_distances_equal_recorded(recording, params, features):
    distances = compare(params, *features)
    assert relative_error(distances, recording["full_perlayer"]) < TOLERANCE
    assert relative_error(distances.sum(-1), recording["full_value"][:, 0, 0, 0]) < TOLERANCE


def test_value_and_image_gradient_equal_recorded(recording, params, images):
    (_, distances), gradient = value_and_image_gradient(params, *images)
    assert distances.dtype == jnp.float32
    assert relative_error(distances, recording["full_value"][:, 0, 0, 0]) < TOLERANCE
    # The recorded gradient is for images in [-1, 1]; ours are in [0, 1]. Where rounding, which is
    # the processor's, flips a tie of a ReLU or max-pool deep in the network, all pixels that it
    # sees move by about 1e-3 of the largest; the others are as recorded.
    expected = 2.0 * recording["dmean_dimgb"].transpose(0, 2, 3, 1)
    errors = np.abs(np.asarray(gradient) - expected) / np.abs(expected).max()
    assert np.median(errors) < TOLERANCE
    assert np.linalg.norm(gradient - expected) < 1e-2 * np.linalg.norm(expected)


def test_initial_parameters_have_the_recorded_tree(params):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    created = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(jnp.shape, params)


def test_zero_features_have_value_and_gradient_zero():
    features = np.zeros((1, 2, 1, 4), np.float32)
    features[0, 1, 0] = [3.0, 0.0, 4.0, 0.0]
    expected = features / 5.0
    np.testing.assert_allclose(unit_normalise(features), expected, rtol=1e-6)
    total = lambda x: (unit_normalise(x) * np.arange(4.0)).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(features)
    np.testing.assert_array_equal(gradient[0, 0], 0)
    assert np.isfinite(gradient).all() and np.abs(gradient[0, 1]).max() > 0


def test_gradient_is_finite_where_a_tap_vanishes(params, images):
    dead = {**params, "features_0": {**params["features_0"]}}
    dead["features_0"]["bias"] = np.full((64,), -1e4, np.float32)
    dead["features_2"] = {**params["features_2"], "bias": np.full((64,), -1.0, np.float32)}
    taps = extract(dead, images[1])
    assert not taps[0].any() and taps[4].any()
    (_, distances), gradient = value_and_image_gradient(dead, *images)
    np.testing.assert_allclose(distances, 0, atol=1e-9)
    assert np.isfinite(gradient).all()


def test_bfloat16_distance_is_close(recording, params, images):
    half = jax.jit(LPIPS(dtype=jnp.bfloat16).apply)({"params": params}, *images)
    assert half.dtype == jnp.float32
    assert relative_error(half, recording["full_value"][:, 0, 0, 0]) < 0.02


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 16 pixels per side; got 15 x 32"):
        LPIPS().init(jax.random.key(0), jnp.zeros((1, 15, 32, 3)), jnp.zeros((1, 15, 32, 3)))
