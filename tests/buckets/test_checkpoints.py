"""Checkpoints in buckets: committed by a last object, sealed, and not worth a run's end."""

import jax
import pytest

from dinosae_jax.runtime import buckets, files, sharding
from dinosae_jax.weights import checkpoint, integrity
from tests.weights import faults

pytestmark = pytest.mark.slow


def steps_in(folder):
    return sorted(int(n) for n in files.names_in(folder / checkpoint.FOLDER) if n.isdigit())


def test_the_newest_committed_checkpoint_comes_back(folder):
    faults.save_steps(folder, [1, 2, 3, 4])
    assert steps_in(folder) == [2, 3, 4]
    (folder / checkpoint.FOLDER / "4" / integrity.COMMIT).unlink()  # killed before the commit
    assert checkpoint.newest(folder) == folder / checkpoint.FOLDER / "3"
    assert faults.is_state(faults.restore(folder), 3)
    faults.save_steps(folder, [4])  # what was left of it is written anew
    assert faults.is_state(faults.restore(folder), 4)


def test_every_object_is_sealed(folder):
    faults.save_steps(folder, [1])
    place = folder / checkpoint.FOLDER / "1"
    sealed = integrity.read_seal(place)
    assert sealed == integrity.hashes(place) and len(sealed) > 5


def test_a_damaged_checkpoint_is_set_aside(folder, capsys):
    faults.save_steps(folder, [1, 2])
    place = folder / checkpoint.FOLDER / "2"
    for name, found in buckets.listing(place).items():
        if "/d/" in name:
            files.write_bytes(place / name, (place / name).read_bytes()[: found.size // 2])
    assert faults.is_state(faults.restore(folder), 1)
    assert "step 2 is damaged" in capsys.readouterr().out
    assert "2.damaged" in files.names_in(folder / checkpoint.FOLDER)
    assert "2.damaged" in checkpoint.lost_work(folder)


def failing(steps):
    """A plan that forbids to write the arrays of some steps."""
    places = [f"checkpoints{slash}{step}{slash}state" for step in steps for slash in ("/", "%2F")]
    writes = ("POST", "PUT")
    return lambda method, path: "403" if method in writes and any(p in path for p in places) else ""


def test_a_checkpoint_that_fails_does_not_stop_a_run(folder, between, capsys):
    between.plan = failing([2])
    with checkpoint.open_manager(folder, keep=3) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, faults.make_state(step), {"note": step})
        checkpoint.wait(manager)
    said = capsys.readouterr().out
    assert said.count("A checkpoint could not be written") == 1
    assert "that of step 1 is safe" in said
    assert faults.is_state(faults.restore(folder), 3)
    assert checkpoint.newest(folder).name == "3"


def test_three_failures_in_a_row_stop_a_run(folder, between):
    between.plan = failing([2, 3, 4])
    with checkpoint.open_manager(folder, keep=3) as manager:
        for step in (1, 2, 3, 4):
            checkpoint.save(manager, faults.make_state(step), {"note": step})
        with pytest.raises(OSError, match=r"^3 checkpoints in a row .* that of step 1 is safe"):
            checkpoint.wait(manager)
    assert faults.is_state(faults.restore(folder), 1)


def test_a_run_does_not_end_without_its_last_checkpoint(folder, between):
    between.plan = failing([2])
    with checkpoint.open_manager(folder, keep=3) as manager:
        checkpoint.save(manager, faults.make_state(1), {})
        checkpoint.save(manager, faults.make_state(2), {})
        with pytest.raises(OSError, match="the last checkpoint could not be written"):
            checkpoint.wait(manager)


def test_a_checkpoint_is_not_saved_without_what_comes_first(folder):
    def first():
        raise OSError("no lines")

    with checkpoint.open_manager(folder, keep=3) as manager:
        checkpoint.save(manager, faults.make_state(1), {}, first)
        assert manager.failures == 1 and manager.all_steps() == []


def test_a_bucket_that_is_away_is_no_damage(folder, between):
    faults.save_steps(folder, [1, 2])
    before = buckets.listing(folder / checkpoint.FOLDER)
    forbidden = ("/2/state", "%2F2%2Fstate")
    between.plan = lambda method, path: "403" if any(p in path for p in forbidden) else ""
    target = faults.abstract(faults.make_state(0), sharding.make_mesh(1, jax.devices()[:1]))
    with checkpoint.open_manager(folder, keep=3) as manager, pytest.raises(OSError):
        checkpoint.restore_newest(manager, target)
    between.plan = lambda method, path: ""
    assert buckets.listing(folder / checkpoint.FOLDER) == before
    assert faults.is_state(faults.restore(folder), 2)
