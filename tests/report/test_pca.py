"""Principal components of tokens: against NumPy's SVD, and what figures look like."""

import numpy as np
import pytest

from dinosae_jax.report import pca


@pytest.fixture
def tokens():
    generator = np.random.default_rng(0)
    scales = np.asarray([5.0, 4.0, 3.0, 1.0, 0.5, 0.1])
    return (generator.normal(size=(2, 4, 6, 6)) * scales + 2.0).astype(np.float32)


def test_components_are_those_of_the_singular_value_decomposition(tokens):
    components = pca.fit(tokens)
    unit = tokens.reshape(-1, 6).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    _, values, rows = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(components.directions.T), np.abs(rows[:3]), atol=1e-8)
    np.testing.assert_allclose(components.deviations, values[:3] / np.sqrt(len(unit) - 1))
    assert np.all(components.directions.max(0) == np.abs(components.directions).max(0))


def test_colours_see_the_direction_of_a_token_alone(tokens):
    components = pca.fit(tokens)
    values = pca.colours(tokens, components)
    assert values.shape == (2, 4, 6, 3)
    assert values.min() > 0
    assert values.max() < 1
    np.testing.assert_allclose(pca.colours(7.0 * tokens, components), values, rtol=1e-6)
    whitened = np.log(values / (1 - values)) / 2
    np.testing.assert_allclose(whitened.reshape(-1, 3).std(0, ddof=1), 1.0, rtol=1e-6)


def test_figure_sets_student_below_teacher_below_images(tokens):
    images = np.zeros((2, 64, 96, 3), np.float32)
    same = pca.figure(images, tokens, tokens)
    assert same.shape == (3 * 64 + 8, 2 * 96 + 4, 3)
    np.testing.assert_array_equal(same[68:132], same[136:])
    turned = pca.figure(images, tokens, tokens[..., ::-1], fitted_on="joint")
    assert np.any(turned[68:132] != turned[136:])


def test_bad_input_is_one_clear_line(tokens):
    images = np.zeros((2, 64, 96, 3))
    with pytest.raises(ValueError, match="at least 4 tokens of 3 dimensions; got 3 of 6"):
        pca.fit(tokens[0, 0, :3])
    with pytest.raises(ValueError, match="of the same b images"):
        pca.figure(images, tokens, tokens[:1])
    with pytest.raises(ValueError, match="'teacher' or 'joint'"):
        pca.figure(images, tokens, tokens, "student")
    with pytest.raises(ValueError, match="tokens must be finite"):
        pca.figure(np.zeros((2, 64, 96, 3)), tokens, np.full_like(tokens, np.nan))
