"""The smallest autoencoder stage with every kind of module, shared by the tests of the step."""

import functools

import jax
import numpy as np
import pytest

from configs import sae_stage1
from dinosae_jax.runtime import precision
from dinosae_jax.train import autoencoder_step, autoencoder_task
from tests import tiny_stage

TINIEST = {
    "batch_size": 8,
    **tiny_stage.SMALLEST,
    "model.dino.patch_size": 56,
    "model.dino.embed_dim": 16,
}


@pytest.fixture(scope="session")
def make_config():
    """(changes) -> config of the tiniest stage."""

    def make(**changes):
        config = sae_stage1.get_config("tiny")
        config.update_from_flattened_dict(TINIEST)
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        return precision.resolve_config(config)

    return make


@pytest.fixture(scope="session")
def make_run():
    """(config, seed of the images) -> (stage, state, frozen, numbers, batch) at step 0."""

    @functools.cache
    def variables_of(stage, size):
        draw = functools.partial(autoencoder_task.draw_variables, stage, image_size=size)
        return jax.device_get(jax.jit(draw)(jax.random.PRNGKey(0)))

    def make(config, seed=0):
        stage = autoencoder_task.step_spec(config)
        variables = variables_of(stage, config.data.image_size)
        trained = (*stage.trainable, "disc_heads")
        frozen = {role: tree for role, tree in variables.items() if role not in trained}
        state = autoencoder_step.create_state(stage, variables, seed=0)
        side = config.data.image_size
        images = np.random.default_rng(seed).integers(0, 256, (config.batch_size, side, side, 3))
        batch = {"image": images.astype(np.uint8)}
        return stage, state, frozen, autoencoder_step.hyperparameters(config), batch

    return make
