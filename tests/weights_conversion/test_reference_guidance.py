"""Guidance of RAE's LightningDiT, for which no recording has a second model."""

import numpy as np

from weights_conversion.verification import reference_guidance


def test_autoguidance_extrapolates_from_the_weaker_model_on_the_first_half():
    rng = np.random.default_rng(0)
    x, t, y = rng.normal(size=(6, 2, 2, 4)), rng.uniform(size=6), np.array([1, 2, 3, 9, 9, 9])
    seen = []

    def model(x, t, y):
        seen.append(len(x))
        return x * (t * y)[:, None, None, None]

    def guide(x, t, y):
        return model(x, t, y) + 1.0

    found = reference_guidance.rae_lightningdit_autoguidance(model, guide, x, t, y, 1.5)
    strong = x[:3] * (t * y)[:3, None, None, None]
    want = strong + 1.0 + 1.5 * (strong - (strong + 1.0))
    np.testing.assert_allclose(found, np.concatenate([want, want]), rtol=1e-6)
    assert seen == [3, 3]  # the second half of the doubled batch is not computed
