"""Rotary position embedding of DINOv3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import attention, rope

table_of = jax.jit(rope.rope_table, static_argnums=(1, 2))


@jax.jit
def rotate(x, sin, cos):
    return attention.rotate(x, attention.Rotation(cos, sin, distance=x.shape[-1] // 2))


def test_default_periods_of_a_head_of_64():
    periods = rope.default_periods(64)
    assert periods.shape == (16,)
    np.testing.assert_allclose(periods[:3], [1.0, 1.3335215, 1.7782794], rtol=1e-6)
    np.testing.assert_allclose(periods[8], 10.0, rtol=1e-6)


def test_head_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4; got 6"):
        rope.default_periods(6)


def test_table_is_y_then_x_twice_in_row_major_order():
    periods = np.array([1.0, 7.5], np.float32)
    sin, cos = table_of(periods, 2, 3)
    assert sin.shape == cos.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            y, x = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
            half = np.concatenate([2 * np.pi * y / periods, 2 * np.pi * x / periods])
            angles = np.concatenate([half, half])
            np.testing.assert_allclose(sin[row * 3 + column], np.sin(angles), atol=1e-6)
            np.testing.assert_allclose(cos[row * 3 + column], np.cos(angles), atol=1e-6)


def test_rotation_pairs_a_dimension_with_the_one_half_a_head_away():
    angle = 0.7
    x = np.arange(1.0, 5.0, dtype=np.float32).reshape(1, 1, 1, 4)
    sin, cos = (np.full((1, 4), f(angle), np.float32) for f in (np.sin, np.cos))
    got = np.asarray(rotate(x, sin, cos))[0, 0, 0]
    plane = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(got[[0, 2]], plane @ [1, 3], rtol=1e-6)
    np.testing.assert_allclose(got[[1, 3]], plane @ [2, 4], rtol=1e-6)


def test_products_of_rotated_vectors_depend_on_the_offset_only():
    vectors = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    table = table_of(np.array([1.0, 3.0], np.float32), 4, 5)
    q, k = (np.asarray(rotate(np.broadcast_to(v, (1, 20, 1, 8)), *table))[0, :, 0] for v in vectors)
    products = q @ k.T
    at = lambda a, b: products[a[0] * 5 + a[1], b[0] * 5 + b[1]]  # noqa: E731
    np.testing.assert_allclose(at((0, 0), (2, 3)), at((1, 1), (3, 4)), rtol=1e-5)
    assert abs(at((0, 0), (2, 3)) - at((0, 0), (3, 2))) > 1e-3


def test_tokens_before_the_patches_are_not_rotated():
    table = rope.prepend_identity(table_of(rope.default_periods(8), 2, 2), count=3)
    x = np.random.default_rng(1).normal(size=(2, 7, 2, 8)).astype(np.float32)
    got = np.asarray(rotate(x, *table))
    np.testing.assert_array_equal(got[:, :3], x[:, :3])
    assert np.abs(got[:, 3:] - x[:, 3:]).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
    sin, cos = table_of(rope.default_periods(8), 3, 3)
    x = np.random.default_rng(2).normal(size=(1, 9, 1, 8)).astype(jnp.bfloat16)
    got = rotate(x, sin, cos)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(rotate(x.astype(np.float32), sin, cos)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)
