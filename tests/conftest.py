"""Eight CPU devices, a compilation cache, full matmul precision: set before jax is imported."""

import fcntl
import functools
import gc
import os
import pathlib
import shutil
import tempfile

from tests import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{xla_flags.flags(8)} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "dinosae_jax_test_cache")
)
# Tests write thousands of small files: into memory, where the machine has a folder and room for it.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

from configs import sae_stage1
from dinosae_jax.data import png
from dinosae_jax.runtime import distributed, precision
from dinosae_jax.train import autoencoder_step, autoencoder_task, stages
from tests import tiny

gc.set_threshold(100_000, 20, 100)  # tracing makes many objects, few of which are garbage
distributed.spare_threads()
jax.config.update("jax_default_matmul_precision", "highest")

RECORDINGS = pathlib.Path(__file__).parent / "recordings"


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """tests/recordings: recorded inputs, weights and outputs of the reference implementations."""
    return RECORDINGS


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The folder named by DINOSAE_GOLDEN with the complete recordings; skips where not set."""
    folder = os.environ.get("DINOSAE_GOLDEN")
    if not folder:
        pytest.skip("DINOSAE_GOLDEN is not set: only the recordings in tests/recordings are used")
    return pathlib.Path(folder)


SIDE, EACH = 32, 7


def made_once(tmp_path_factory, name, make):
    """A folder that all workers share, filled by `make` in the first that asks for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    made = root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make(root / name)
            made.touch()
    return root / name


@pytest.fixture(scope="session")
def flow_workdir(tmp_path_factory):
    """The workdir of a finished run; do not change it."""
    run = functools.partial(stages.run_stage, tiny.small_flow())
    return made_once(tmp_path_factory, "flow_run", run)


@pytest.fixture(scope="session")
def stage_workdir(tmp_path_factory):
    """The workdir of a stage that ended at step 0; do not change it."""
    return made_once(tmp_path_factory, "ended_at_0", tiny.write) / "stage"


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A folder with the splits train and val of two classes, dark and bright, 7 images each."""
    root = tmp_path_factory.mktemp("squares")
    for split, seed in (("train", 0), ("val", 1)):
        for number, name in enumerate(("bright", "dark")):
            place = root / split / name
            place.mkdir(parents=True)
            found = tiny.images(EACH, SIDE, SIDE, seed=10 * seed + number) // 4
            for index, image in enumerate(found + np.uint8(191 * (name == "bright"))):
                png.write_png(place / f"{index}.png", image)
    return root


@pytest.fixture
def make_measurement(squares):
    """(config module, changes) -> its tiny config with the smallest model and these images."""

    def make(module, **changes):
        config = module.get_config("tiny")
        config.random_model = tiny.model()
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


TINIEST_STEP = {
    "batch_size": 8,
    **tiny.SMALLEST,
    "model.dino.patch_size": 56,
    "model.dino.embed_dim": 16,
}


@pytest.fixture(scope="session")
def make_config():
    """(changes) -> config of the tiniest stage."""

    def make(**changes):
        config = sae_stage1.get_config("tiny")
        config.update_from_flattened_dict(TINIEST_STEP)
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
