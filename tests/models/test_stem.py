"""Convolutional stem and patch embedding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.layers import Conv2d, ImageRMSNorm
from dinosae_jax.models.stem import ConvStem, PatchStem


@functools.cache
def tiny_stem():
    stem, random = ConvStem(16, widths=(4, 8, 12)), np.random.default_rng(0)
    shapes = jax.eval_shape(stem.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return stem, jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def test_reference_parameter_count():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(ConvStem(1024).init, jax.random.key(0), images)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 2_737_792
    assert set(params) == {"cnn_0", "cnn_1", "cnn_2", "cnn_3"}
    assert set(params["cnn_3"]) == {"conv"}


@pytest.mark.parametrize(("size", "grid"), [((64, 48), (4, 3)), ((70, 50), (5, 4))])
def test_grid_is_rounded_up(size, grid):
    stem, variables = tiny_stem()
    out = jax.eval_shape(stem.apply, variables, jnp.zeros((2, *size, 3)))
    assert out.shape == (2, *grid, 16)
    assert out.dtype == jnp.float32


def test_stride_two_is_padded_evenly():
    """The first output looks at pixels -1, 0, 1; "SAME" would take 0, 1, 2 on an even length."""
    conv = Conv2d(1, kernel_size=3, stride=2, use_bias=False)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    got = conv.apply({"params": {"kernel": kernel}}, image)
    np.testing.assert_array_equal(got[0, ..., 0], [[0, 2], [8, 10]])


def test_norm_has_one_statistic_per_image():
    x = (
        jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
        * jnp.array([1.0, 9.0])[:, None, None, None]
    )
    scale = jnp.linspace(0.5, 1.5, 5)
    got = ImageRMSNorm().apply({"params": {"scale": scale}}, x)
    want = scale * x / np.sqrt(np.mean(np.square(x), axis=(1, 2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_initial_kernels_are_uniform_within_the_fan_in():
    params = Conv2d(64, kernel_size=7).init(jax.random.key(0), jnp.zeros((1, 7, 7, 3)))["params"]
    bound = (7 * 7 * 3) ** -0.5
    for leaf in (params["kernel"], params["bias"]):
        assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
    assert float(jnp.std(params["kernel"])) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_bfloat16_keeps_norms_in_float32():
    """2% of the largest value: bfloat16 has a relative step of 0.4%, over four convolutions."""
    stem, variables = tiny_stem()
    images = np.random.default_rng(2).normal(size=(1, 32, 32, 3)).astype(np.float32)
    want = jax.jit(stem.apply)(variables, images)
    half = ConvStem(16, (4, 8, 12), jnp.bfloat16)
    got, state = jax.jit(
        functools.partial(half.apply, capture_intermediates=True, mutable=["intermediates"])
    )(variables, images)
    layers = state["intermediates"]
    assert layers["cnn_0"]["conv"]["__call__"][0].dtype == jnp.bfloat16
    assert layers["cnn_0"]["norm"]["__call__"][0].dtype == got.dtype == jnp.float32
    assert 0 < float(jnp.abs(got - want).max()) < 0.02 * float(jnp.abs(want).max())


def test_patch_stem_is_a_matrix_product_per_patch():
    stem = PatchStem(8, patch_size=4)
    images = np.random.default_rng(3).normal(size=(1, 8, 13, 3)).astype(np.float32)
    variables = stem.init(jax.random.key(4), images)
    proj = variables["params"]["proj"]
    got = stem.apply(variables, images)
    assert got.shape == (1, 2, 3, 8)
    patch = images[0, 4:8, 8:12].reshape(-1)
    want = patch @ proj["kernel"].reshape(-1, 8) + proj["bias"]
    np.testing.assert_allclose(got[0, 1, 2], want, atol=1e-5)


def test_the_norms_make_the_stem_blind_to_contrast():
    """As published (CnnPatchEmbed): no bias, and a norm over the image after the first layer."""
    images = jax.random.normal(jax.random.PRNGKey(0), (1, 32, 32, 3))
    for norm, blind in (("trms2d", True), (None, False)):
        stem = ConvStem(8, (4, 4, 4), norm=norm)
        patches, variables = jax.jit(stem.init_with_output)(jax.random.PRNGKey(1), images)
        fainter = jax.jit(stem.apply)(variables, 0.5 * images)
        change = float(jnp.linalg.norm(patches - fainter) / jnp.linalg.norm(patches))
        assert (change < 1e-3) == blind, (norm, change)
