"""The sheet of norms and directions: what moves in each row, what stays, and where it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.flow import sphere
from dinosae_jax.report import pictures, sphere_picture


@pytest.fixture(scope="module")
def latents():
    z, other = 3.0 * np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    return z, other, jax.jit(sphere_picture.moved_latents)(z, other, jax.random.PRNGKey(1))


def test_the_first_row_changes_norms_alone(latents):
    z, _, moved = latents
    angles = sphere.angle(moved["norm"], jnp.broadcast_to(z, moved["norm"].shape))
    np.testing.assert_allclose(angles, 0.0, atol=1e-3)
    ratios = sphere.norm(moved["norm"])[..., 0] / sphere.norm(z)[..., 0]
    expected = np.asarray(sphere_picture.FACTORS)[:, None]
    np.testing.assert_allclose(ratios, np.broadcast_to(expected, ratios.shape), rtol=1e-5)


def test_the_other_rows_change_directions_alone(latents):
    z, other, moved = latents
    norms = sphere.norm(z)[..., 0]
    for row in (moved["other"], moved["noise"]):
        found = sphere.norm(row)[..., 0]
        np.testing.assert_allclose(found, np.broadcast_to(norms, found.shape), rtol=1e-5)
        np.testing.assert_allclose(row[0], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sphere.angle(moved["other"][-1], other), 0.0, atol=1e-3)
    turned = np.rad2deg(sphere.angle(moved["noise"], jnp.broadcast_to(z, moved["noise"].shape)))
    expected = np.broadcast_to(np.asarray(sphere_picture.ANGLES)[:, None], turned.shape)
    np.testing.assert_allclose(turned, expected, atol=0.1)


def test_the_sheet_has_a_captioned_row_of_five_pictures_for_each_move(latents):
    z, other, _ = latents
    sizes = []

    def decode(tokens):
        """Grey images whose level is the mean norm of the tokens over 20, 128 pixels a side."""
        sizes.append(tokens.shape)
        level = sphere.norm(tokens).mean(axis=(1, 2)) / 20.0
        return jnp.broadcast_to(level[:, None, None, None], (len(tokens), 128, 128, 3))

    sheet = sphere_picture.draw(decode, z, other, jax.random.PRNGKey(1))
    assert sizes == [(15, 4, 8)]
    column = 128 + pictures.GAP
    caption = (len(sheet) - 3 * 128 - 2 * pictures.GAP) // 3
    middles = [row * (caption + 128 + pictures.GAP) + caption + 64 for row in range(3)]
    found = sheet[np.ix_(middles, [n * column + 64 for n in range(5)])][..., 0] / 255.0
    level = float(sphere.norm(z).mean()) / 20.0
    np.testing.assert_allclose(found[0], level * np.asarray(sphere_picture.FACTORS), atol=0.01)
    np.testing.assert_allclose(found[1:], level, atol=0.01)
