"""Several processes of one run whose workdir is in a bucket."""

import jax
import numpy as np
import pytest

from dinosae_jax.runtime import files
from tests import tiny
from tests.train import kills, test_processes

pytestmark = pytest.mark.slow


def test_two_processes_stop_and_go_on_as_on_a_disk(folder, tmp_path):
    tiny.write_images(tmp_path / "data")
    changes = test_processes.SMALL | {"data.source": f"folder:{tmp_path}/data", "steps": 6}
    for place, stop_at in ((folder, {1: 2}), (folder, {}), (tmp_path / "disk", {})):
        printed = test_processes.run(changes, place, tmp_path / "b", processes=2, stop_at=stop_at)
        assert ("sae_stage1 stopped at step 4 of 6" in printed) == bool(stop_at), printed
    ours, theirs = folder, files.path(tmp_path / "disk")
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    states = kills.state_of(ours), kills.state_of(theirs)
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert "DONE" in files.names_in(folder)
