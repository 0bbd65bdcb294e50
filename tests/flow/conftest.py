"""Recordings of the flow's mathematics, float64 mode, and keys."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest


@pytest.fixture(params=["compact", "complete"])
def load(request: pytest.FixtureRequest) -> Callable[[str], dict[str, np.ndarray]]:
    """Read a recording by name: from tests/recordings, and from the complete folder if any."""
    if request.param == "compact":
        folder, pattern = request.getfixturevalue("data_dir") / "flow", "{}.npz"
    else:
        folder, pattern = request.getfixturevalue("golden_dir") / "generation", "*/{}.npz"

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(next(folder.glob(pattern.format(name)))) as archive:
            return dict(archive)

    return read


@pytest.fixture
def x64() -> Iterator[None]:
    """Run one test with 64-bit types."""
    with jax.enable_x64(True):
        yield
