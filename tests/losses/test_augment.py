"""DiffAug against recorded outputs with recorded random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.losses.augment import (
    augmentation_uniforms,
    cut_out,
    diff_augment,
    jitter_colour,
    translate,
)

ATOL = 2e-6  # float32 rounding of values up to about 4, twice


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "diffaug.npz")


@pytest.fixture(scope="module")
def images(recording):
    return recording["x"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def uniforms(recording):
    return recording["rand01"][:, :, 0, 0]


def check(actual, expected):
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), atol=ATOL)


@pytest.mark.parametrize(
    "name, operation, rows",
    [
        ("trans_only", translate, slice(0, 2)),
        ("color_only", jitter_colour, slice(2, 5)),
        ("cut0p2_only", lambda image, r: cut_out(image, r, 0.2), slice(5, 7)),
    ],
)
def test_single_operations_equal_recorded(recording, images, uniforms, name, operation, rows):
    each = jax.jit(jax.vmap(operation, in_axes=(0, 1)))
    check(each(images, uniforms[rows]), recording[name])


@pytest.mark.parametrize("name, cutout", [("all_cut0", 0.0), ("all_cut0p2", 0.2)])
def test_chain_equals_recorded(recording, images, uniforms, name, cutout):
    check(jax.jit(diff_augment, static_argnums=2)(images, uniforms, cutout), recording[name])


def test_sweep_of_the_complete_recording(golden_dir):
    recording = np.load(golden_dir / "metrics" / "diffaug.npz")
    images, r = recording["x"].transpose(0, 2, 3, 1), recording["rand01"][5:, :, 0, 0]
    blanked = jax.vmap(lambda image, r: cut_out(image, r, 0.5), in_axes=(0, 1))(images, r)
    check(blanked, recording["cut0p5_only"])
    np.testing.assert_array_equal(cut_out(images[0], r[:, 0], 0.0), images[0])


def test_translation_reaches_both_ends():
    image = np.arange(1.0, 257.0, dtype=np.float32).reshape(16, 16, 1)
    move = jax.jit(translate)
    first = move(image, np.zeros(2, np.float32))
    np.testing.assert_array_equal(first[2:, 2:], image[:-2, :-2])
    np.testing.assert_array_equal(first[:2], 0)
    last = move(image, np.full(2, 1 - 2**-24, np.float32))
    np.testing.assert_array_equal(last[:-2, :-2], image[2:, 2:])


def test_gradient_with_respect_to_the_images():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1.0, 1.0, (2, 16, 16, 3)).astype(np.float32)
    uniforms = rng.uniform(size=(7, 2)).astype(np.float32)
    direction, weights = rng.normal(size=(2, *images.shape)).astype(np.float32)
    augment = jax.jit(lambda x: diff_augment(x, uniforms))
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(diff_augment(x, uniforms), weights)))(images)
    # Linear up to the brightness shift, so a finite step is exact to rounding.
    change = augment(images + direction) - augment(images)
    np.testing.assert_allclose(np.vdot(gradient, direction), np.vdot(change, weights), rtol=1e-4)


def test_uniforms_depend_on_the_global_index_only():
    key = jax.random.key(3)
    draw = jax.jit(augmentation_uniforms)
    whole, shard = (np.asarray(draw(key, np.arange(first, 8))) for first in (0, 4))
    assert whole.shape == (7, 8)
    assert ((whole >= 0) & (whole < 1)).all()
    np.testing.assert_array_equal(whole[:, 4:], shard)
    assert len(np.unique(whole)) == whole.size
