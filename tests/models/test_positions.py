"""Sin-cos table and rotary embedding of the diffusion transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import attention, positions


def test_sincos_first_half_is_the_column():
    table = positions.sincos_table(3, 8).reshape(3, 3, 8)
    assert table.dtype == np.float32
    # Along a row of the grid only the first half changes, along a column only the second.
    np.testing.assert_array_equal(table[0, :, 4:], np.broadcast_to(table[0, 0, 4:], (3, 4)))
    np.testing.assert_array_equal(table[:, 0, :4], np.broadcast_to(table[0, 0, :4], (3, 4)))
    frequencies = np.array([1.0, 0.01])
    expected = np.concatenate([np.sin(2 * frequencies), np.cos(2 * frequencies)])
    np.testing.assert_allclose(table[1, 2, :4], expected, rtol=1e-6)
    np.testing.assert_allclose(table[2, 1, 4:], expected, rtol=1e-6)


def test_rope_turns_the_first_half_by_the_row():
    cos, sin = positions.rope_tables(3, 8)
    # Row 2, column 1: two frequencies per axis, each for two neighbouring channels.
    angle = np.repeat([2.0, 0.02, 1.0, 0.01], 2)
    np.testing.assert_allclose(cos[2 * 3 + 1], np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(sin[2 * 3 + 1], np.sin(angle), rtol=1e-6)


def test_rope_is_a_rotation_of_neighbouring_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 8)).astype(np.float32)
    cos, sin = positions.rope_tables(3, 8)
    turned = attention.rotate(jnp.asarray(x), attention.Rotation(cos, sin, distance=1))
    phase = (cos[:, 0::2] + 1j * sin[:, 0::2])[None, :, None]
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * phase
    # float32 products of numbers of size 3: 1e-6 is about four ulp.
    np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-6)


def test_rope_products_depend_on_relative_position_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.normal(size=8), (1, 16, 1, 1)), jnp.float32) for _ in "qk")
    rope = attention.Rotation(*positions.rope_tables(4, 8), distance=1)
    logits = jnp.einsum("bnkd,bmkd->nm", *(attention.rotate(a, rope) for a in (q, k)))
    moved = np.asarray(logits).reshape(4, 4, 4, 4)
    # From (0, 0) to (1, 2) as from (2, 1) to (3, 3).
    np.testing.assert_allclose(moved[0, 0, 1, 2], moved[2, 1, 3, 3], rtol=1e-5)
    assert abs(moved[0, 0, 1, 2] - moved[0, 0, 2, 1]) > 1e-3


@pytest.mark.parametrize("table", [positions.sincos_table, positions.rope_tables])
def test_widths_must_divide_by_four(table):
    with pytest.raises(ValueError, match="divisible by 4; got 6"):
        table(2, 6)
