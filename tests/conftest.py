"""Eight CPU devices, a compilation cache, full matmul precision: set before jax is imported."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # On a busy machine a device may be late at a collective; the default is to abort after 40 s.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    )
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "dinosae_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

from dinosae_jax.runtime import distributed

distributed.spare_threads()
jax.config.update("jax_default_matmul_precision", "highest")

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """tests/data: recorded inputs, weights and outputs of the reference implementations."""
    return DATA


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The folder named by DINOSAE_GOLDEN with the complete recordings; skips where not set."""
    folder = os.environ.get("DINOSAE_GOLDEN")
    if not folder:
        pytest.skip("DINOSAE_GOLDEN is not set: only the recordings in tests/data are used")
    return pathlib.Path(folder)
