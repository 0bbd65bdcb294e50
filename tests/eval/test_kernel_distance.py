"""KID: the estimator against its definition, its lack of bias, and its errors."""

import numpy as np
import pytest

from dinosae_jax.eval import kernel_distance


def features(seed, count, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (count, 6)).astype(np.float32)


def test_squared_mmd_is_its_definition():
    x, y = features(0, 5), features(1, 7)

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return np.mean([(float(a[i] @ b[j]) / 6 + 1) ** 3 for i, j in pairs])

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    np.testing.assert_allclose(kernel_distance.squared_mmd(x, y), expected, rtol=1e-5)


def test_equal_distributions_are_at_zero_within_the_spread_and_others_are_not():
    same, spread = kernel_distance.kernel_distance(features(0, 400), features(1, 400), 20, 200)
    assert abs(same) < 3 * spread
    apart, spread = kernel_distance.kernel_distance(
        features(0, 400), features(1, 400, 1.0), 20, 200
    )
    assert apart > 5 * spread


def test_same_numbers_every_time():
    x, y = features(0, 60), features(1, 50)
    runs = [kernel_distance.kernel_distance(x, y, 3, 40) for _ in range(2)]
    assert runs[0] == runs[1]


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match="at least 1000 samples; got 60"):
        kernel_distance.kernel_distance(features(0, 60), features(1, 60))
    with pytest.raises(ValueError, match="one dimension"):
        kernel_distance.kernel_distance(features(0, 60), features(1, 60)[:, :3], 1, 50)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        kernel_distance.kernel_distance(features(0, 60), features(1, 60), 3, 1)
