"""Losses of 20 tiny steps in float32 on a CPU, as they were before attention had kernels."""

import numpy as np
import pytest

from tests.train import test_autoencoder_step, test_flow_step

FLOW = (
    2.4419460,
    2.4564347,
    2.4085021,
    2.3999109,
    2.3613729,
    2.2811069,
    2.2982903,
    2.2898178,
    2.2318497,
    2.2266312,
    2.2557182,
    2.2377586,
    2.2286949,
    2.2033997,
    2.1911659,
    2.1884193,
    2.1280060,
    2.0722656,
    2.1161804,
    2.1153297,
)
STAGE_2 = (
    0.7612665,
    0.7977126,
    0.7598327,
    0.7850494,
    0.7458622,
    0.7622845,
    0.7597685,
    0.7604985,
    0.7361722,
    0.7324491,
    0.7332072,
    0.7134171,
    0.7080708,
    0.7370596,
    0.6887150,
    0.6800604,
    0.6894360,
    0.6965342,
    0.6999655,
    0.6968756,
)


def test_a_flow_has_its_recorded_losses():
    batches = [test_flow_step.batch_of(seed) for seed in range(len(FLOW))]
    history, _ = test_flow_step.run(test_flow_step.small_config(), batches)
    assert [line["loss"] for line in history] == pytest.approx(FLOW, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_stage_2_has_its_recorded_losses(make_config, make_run):
    stage, state, frozen, values, batch = make_run(make_config(**test_autoencoder_step.GAN))
    step, losses = test_autoencoder_step.step_of(stage), []
    for seed in range(len(STAGE_2)):
        images = np.random.default_rng(seed).integers(0, 256, batch["image"].shape)
        before = float(state.metrics["loss"].total)
        state = step(state, frozen, {"image": images.astype(np.uint8)}, values)
        losses.append(float(state.metrics["loss"].total) - before)
    # After some steps rounding moves an activation across the kink of a ReLU, which changes the
    # GAN's weight: the same step compiled at levels 0, 1 and 3 differs from here on by up to 7e-4.
    assert losses[:4] == pytest.approx(STAGE_2[:4], rel=1e-5, abs=1e-5)
    assert losses[4:] == pytest.approx(STAGE_2[4:], abs=2e-3)
