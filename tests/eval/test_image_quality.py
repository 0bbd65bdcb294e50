"""PSNR and SSIM against recorded values of RAE, torchmetrics, EfficientViT and skimage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.eval import image_quality

psnr = jax.jit(image_quality.psnr, static_argnames="convention")
ssim = jax.jit(image_quality.ssim, static_argnames="convention")


@pytest.fixture(scope="module")
def recorded(data_dir):
    return np.load(data_dir / "metrics" / "iqa_pairs.npz")


@pytest.fixture(scope="module")
def pairs(recorded):
    return tuple(jnp.asarray(recorded[name], jnp.float32) / 255.0 for name in "ab")


def test_psnr_matches_every_recorded_implementation(recorded, pairs):
    values = np.asarray(psnr(*pairs))
    np.testing.assert_allclose(values, recorded["skimage_psnr_dr255"], rtol=1e-6)
    np.testing.assert_allclose(values, recorded["efficientvit_psnr"], rtol=1e-6)
    np.testing.assert_allclose(values.mean(), recorded["rae_psnr_mean"], rtol=1e-6)


def test_ssim_matches_torchmetrics_and_rae(recorded, pairs):
    values = np.asarray(ssim(*pairs))
    np.testing.assert_allclose(values, recorded["torchmetrics_ssim_dr1"], atol=1e-6)
    np.testing.assert_allclose(values.mean(), recorded["rae_ssim_mean"], atol=1e-6)


def test_ssim_matches_skimage_with_gaussian_weights(recorded, pairs):
    values = ssim(*pairs, convention="skimage")
    np.testing.assert_allclose(values, recorded["skimage_ssim_gauss"], atol=1e-6)


def test_complete_recording(golden_dir):
    full = np.load(golden_dir / "metrics" / "iqa.npz")
    x, y = (jnp.asarray(full[name], jnp.float32) / 255.0 for name in "ab")
    np.testing.assert_allclose(psnr(x, y), full["skimage_psnr_dr255"], rtol=1e-6)
    np.testing.assert_allclose(ssim(x, y), full["torchmetrics_ssim_dr1"], atol=1e-6)


def test_equal_images_score_100_decibels_or_infinity():
    images = jnp.full((2, 16, 16, 3), 0.3)
    np.testing.assert_allclose(psnr(images, images), 100.0, rtol=1e-6)
    assert np.all(np.isinf(psnr(images, images, convention="skimage")))
    np.testing.assert_allclose(ssim(images, images), 1.0, rtol=1e-6)


def test_uint8_conversions_agree_with_their_rules():
    levels = jnp.asarray([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 128.7 / 255, 1.0, 1.3], jnp.float32)
    truncated = image_quality.to_uint8(levels, "truncate")
    np.testing.assert_array_equal(truncated, [0, 0, 0, 0, 128, 255, 255])
    for conversion in ("round", "round_signed"):
        rounded = image_quality.to_uint8(levels, conversion)
        np.testing.assert_array_equal(rounded, [0, 0, 0, 1, 129, 255, 255])


def test_rounding_keeps_every_8_bit_image():
    levels = np.arange(256, dtype=np.uint8)
    images = jnp.asarray(levels, jnp.float32) / 255.0
    for conversion in ("round", "round_signed"):
        np.testing.assert_array_equal(image_quality.to_uint8(images, conversion), levels)


def test_baselines():
    images = jax.random.uniform(jax.random.key(0), (2, 32, 48, 3))
    blocks = image_quality.block_means(images, 16)
    np.testing.assert_allclose(blocks[:, 5, 40], images[:, :16, 32:48].mean((1, 2)), rtol=1e-5)
    colour = image_quality.mean_colour(images)
    np.testing.assert_allclose(colour[:, 31, 0], images.mean((1, 2)), rtol=1e-5)
    better = psnr(blocks, images) > psnr(colour, images)
    assert np.all(better)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: image_quality.to_uint8(x, "floor"), "one of .*got 'floor'"),
        (lambda x: image_quality.psnr(x, x, "255"), "must be 'rae' or 'skimage'"),
        (lambda x: image_quality.psnr(x, x[:, :8]), "one shape"),
        (lambda x: image_quality.ssim(x, x, "gauss"), "must be 'rae' or 'skimage'"),
        (lambda x: image_quality.ssim(x[:, :8], x[:, :8], "skimage"), "at least 11 pixels"),
        (lambda x: image_quality.block_means(x, 5), "multiples of 5"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(jnp.zeros((1, 16, 16, 3)))
    assert "\n" not in str(error.value)
