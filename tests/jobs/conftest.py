"""Data and small runs that the tests of jobs share: a trained flow, images, tiny configs."""

import numpy as np
import pytest

from dinosae_jax.data import png
from dinosae_jax.train import stages
from tests import tiny_stage
from tests.jobs.small_flow import small_flow

SIDE, EACH = 32, 7


@pytest.fixture(scope="session")
def flow_workdir(tmp_path_factory):
    """The workdir of a finished run; do not change it."""
    workdir = tmp_path_factory.mktemp("flow") / "run"
    stages.run_stage(small_flow(), workdir)
    return workdir


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A folder with the splits train and val of two classes, dark and bright, 7 images each."""
    root = tmp_path_factory.mktemp("squares")
    for split, seed in (("train", 0), ("val", 1)):
        for number, name in enumerate(("bright", "dark")):
            place = root / split / name
            place.mkdir(parents=True)
            found = tiny_stage.images(EACH, SIDE, SIDE, seed=10 * seed + number) // 4
            for index, image in enumerate(found + np.uint8(191 * (name == "bright"))):
                png.write_png(place / f"{index}.png", image)
    return root


@pytest.fixture
def make_measurement(squares):
    """(config module, changes) -> its tiny config with the smallest model and these images."""

    def make(module, **changes):
        config = module.get_config("tiny")
        config.random_model = tiny_stage.model()
        values = {
            "data.source": f"folder:{squares}",
            "data.image_size": SIDE,
            "data.threads": 0,
            "batch_size": 8,
        }
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        config.update_from_flattened_dict(values)
        return config

    return make
