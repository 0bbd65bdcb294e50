"""The robustness curve: tokens are turned by the angle asked for, and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.eval import image_quality, robustness
from dinosae_jax.flow import sphere

KEYS = jax.random.split(jax.random.PRNGKey(0), 2)
TOKENS = jax.random.normal(jax.random.PRNGKey(1), (2, 4, 48))


def decode(tokens):
    """A linear decoder [b,4,48] -> [b,8,8,3] around grey."""
    return 0.5 + 0.05 * tokens.reshape(-1, 8, 8, 3)


def test_tokens_are_turned_by_the_angle_and_keep_their_norms():
    seen = []

    def remember(tokens):
        seen.append(tokens)
        return decode(tokens)

    for degrees in (0.0, 5.0, 90.0):
        robustness.turned_psnr(remember, KEYS, TOKENS, decode(TOKENS), degrees)
        angles = np.rad2deg(sphere.angle(TOKENS, seen[-1]))
        np.testing.assert_allclose(angles, degrees, atol=1e-3)
        np.testing.assert_allclose(sphere.norm(seen[-1]), sphere.norm(TOKENS), rtol=1e-5)


def test_psnr_of_a_linear_decoder_follows_the_chord():
    """Turning by a moves a token by 2 sin(a/2) of its norm; the decoder scales that by 0.05."""
    images = jnp.clip(decode(TOKENS), 0.0, 1.0)
    squared = jnp.sum(TOKENS**2, axis=(1, 2)) / images[0].size
    for degrees in (5.0, 20.0, 60.0):
        found = robustness.turned_psnr(decode, KEYS, TOKENS, images, degrees)
        chord = 2.0 * np.sin(np.deg2rad(degrees) / 2.0)
        expected = -10.0 * np.log10((0.05 * chord) ** 2 * squared)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    unturned = robustness.turned_psnr(decode, KEYS, TOKENS, images, 0.0)
    np.testing.assert_allclose(unturned, image_quality.psnr(images, images))


def test_the_curve_has_the_rows_of_the_report():
    rows = robustness.curve(lambda degrees: np.array([30.0 - degrees, 40.0 - degrees]))
    assert [row["angle_degrees"] for row in rows] == [float(a) for a in robustness.ANGLES]
    assert rows[-1] == {"angle_degrees": 90.0, "psnr": pytest.approx(-55.0)}
