"""Checkpoints: resharding, damage, other architectures, partial reads."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.runtime import sharding
from dinosae_jax.weights import checkpoint, integrity, role_files
from tests.weights import faults
from tests.weights.faults import abstract, make_state, save_steps


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restores_on_another_number_of_devices(tmp_path, devices):
    save_steps(tmp_path, [1, 2])
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        state, record = checkpoint.restore_newest(manager, abstract(make_state(0), mesh))
    equal(state, make_state(2))
    assert record["note"] == 2
    assert state.params["decoder"]["kernel"].sharding.device_set == set(mesh.devices.flat)


def test_a_small_array_on_every_device_is_written_whole(tmp_path):
    state = jax.device_put(make_state(1), sharding.replicated(sharding.make_mesh()))
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, state, {})
        checkpoint.wait(manager)
    (described,) = tmp_path.glob("checkpoints/1/state/array_metadatas/process_0")
    entries = [e["array_metadata"] for e in json.loads(described.read_text())["array_metadatas"]]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    assert sorted(tuple(entry["write_shape"]) for entry in entries) == shapes


def test_a_folder_with_letters_of_a_pattern_keeps_its_checkpoints(tmp_path):
    workdir = tmp_path / "run[1]*"
    save_steps(workdir, [1, 2])
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    with checkpoint.open_manager(workdir, keep=3) as manager:
        state, record = checkpoint.restore_newest(manager, abstract(make_state(0), mesh))
        assert checkpoint.workdir_of(manager) == workdir
    equal(state, make_state(2))
    assert record["note"] == 2
    params, _ = checkpoint.load_fields(checkpoint.newest(workdir), ("params",))
    equal(params["params"], jax.device_get(make_state(2).params))


def test_every_damage_is_seen_and_the_one_before_is_used(tmp_path, capsys):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / checkpoint.FOLDER / "2"
    for file in folder.rglob("*"):  # every data file of the newest loses its second half
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        state, _ = checkpoint.restore_newest(manager, abstract(make_state(0), mesh))
    equal(state, make_state(1))
    assert (tmp_path / checkpoint.FOLDER / "2.damaged").exists()
    assert "step 2 is damaged" in capsys.readouterr().out


def test_nothing_starts_from_zero_where_every_checkpoint_is_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for record in (tmp_path / checkpoint.FOLDER).glob("*/record/metadata"):
        record.write_text("{")
    target = abstract(make_state(0), sharding.make_mesh(1, jax.devices()[:1]))
    with (
        checkpoint.open_manager(tmp_path, keep=3) as manager,
        pytest.raises(ValueError, match=r"whole; got none in .* kept as 2.damaged, 1.damaged; put"),
    ):
        checkpoint.restore_newest(manager, target)
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        assert checkpoint.restore_newest(manager, target) is None


def test_a_full_device_is_no_damage(tmp_path, monkeypatch):
    def full(state, expected):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    save_steps(tmp_path, [1])
    target = abstract(make_state(0), sharding.make_mesh(1, jax.devices()[:1]))
    monkeypatch.setattr(integrity, "check_sums", full)
    with (
        checkpoint.open_manager(tmp_path, keep=3) as manager,
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        checkpoint.restore_newest(manager, target)
    assert (tmp_path / checkpoint.FOLDER / "1").exists()


@pytest.mark.parametrize("kind", ["environment", "storage"])
def test_faults_end_well(kind):
    assert faults.run(kind, 20, seed=1) == []


def test_a_checkpoint_without_a_seal_is_sealed_when_it_has_come_back(tmp_path):
    """As older versions wrote it; damage is then told from other errors by their types."""
    save_steps(tmp_path, [1, 2])
    seals = [tmp_path / checkpoint.FOLDER / str(step) / integrity.SEAL for step in (1, 2)]
    sealed = seals[1].read_bytes()
    for seal in seals:
        seal.unlink()
    denied = PermissionError(13, "Permission denied")
    with (
        mock.patch.object(checkpoint, "read_record", side_effect=denied),
        pytest.raises(OSError, match=r"Permission denied.*nothing is renamed"),
    ):
        faults.restore(tmp_path)
    assert faults.is_state(faults.restore(tmp_path), 2)
    assert seals[1].read_bytes() == sealed
    seals[1].unlink()
    (seals[1].parent / "record" / "metadata").write_text("{")
    assert faults.is_state(faults.restore(tmp_path), 1)


def test_lost_peers_rename_nothing_on_any_process(tmp_path, monkeypatch):
    """What another process says is heard: here it is the second that could not read."""
    save_steps(tmp_path, [1, 2])
    real = checkpoint.agreement.gather
    said = "OSError: [Errno 116] Stale file handle"

    def gather(value):
        return [value, said] if value is None else real(value)

    monkeypatch.setattr(checkpoint.agreement, "gather", gather)
    with pytest.raises(OSError, match=r"Stale file handle on process 1; .* nothing is renamed"):
        faults.restore(tmp_path)
    assert {"1", "2"} == {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}


def test_milestones_are_kept(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=1, milestones=2) as manager:
        for step in range(1, 6):
            checkpoint.save(manager, make_state(step), {})
        checkpoint.wait(manager)
        assert sorted(manager.all_steps()) == [2, 4, 5]


def test_what_shows_that_work_was_lost(tmp_path):
    assert checkpoint.lost_work(tmp_path) == ""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "metrics.jsonl with 1 lines" in checkpoint.lost_work(tmp_path)
    checkpoint.note_newest(tmp_path, None)  # a run that ended before its first checkpoint
    assert checkpoint.lost_work(tmp_path) == ""
    checkpoint.note_newest(tmp_path, 4)
    assert "by which step 4 was saved" in checkpoint.lost_work(tmp_path)
    (tmp_path / checkpoint.FOLDER / "4.damaged").mkdir(parents=True)
    assert "4.damaged in" in checkpoint.lost_work(tmp_path)


def test_checksums_see_one_bit_and_an_exchange():
    state = make_state(3)
    before = integrity.checksums(state)
    kernel = np.asarray(state.params["decoder"]["kernel"]).copy()
    flipped = kernel.copy()
    flipped.view(np.uint32)[5, 3] ^= 1
    exchanged = kernel[::-1].copy()
    for changed in (flipped, exchanged):
        other = state.replace(params={"decoder": {"kernel": jnp.asarray(changed)}})
        after = integrity.checksums(other)
        differing = {name for name in before if before[name] != after[name]}
        assert differing == {"params/decoder/kernel"}


def test_another_random_number_generator_is_named(tmp_path):
    save_steps(tmp_path, [1])
    state = make_state(0)
    state = state.replace(key=jnp.zeros((4,), jnp.uint32))
    target = abstract(state, sharding.make_mesh(1, jax.devices()[:1]))
    with (
        checkpoint.open_manager(tmp_path, keep=3) as manager,
        pytest.raises(ValueError, match=r"number generator; got .* of threefry2x32, where this"),
    ):
        checkpoint.restore_newest(manager, target)


def test_another_architecture_is_refused_not_set_aside(tmp_path):
    save_steps(tmp_path, [1])
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    with (
        checkpoint.open_manager(tmp_path, keep=3) as manager,
        pytest.raises(ValueError, match=r"another architecture.*decoder/kernel"),
    ):
        checkpoint.restore_newest(manager, abstract(make_state(0, width=32), mesh))
    assert (tmp_path / checkpoint.FOLDER / "1").exists()


def test_some_fields_alone(tmp_path):
    save_steps(tmp_path, [4])
    tree, record = checkpoint.load_fields(checkpoint.newest(tmp_path), ("ema",))
    assert set(tree) == {"ema"}
    equal(tree["ema"], make_state(4).ema)
    assert record["note"] == 4


def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    with (
        checkpoint.open_manager(tmp_path, keep=1) as manager,
        pytest.raises(OSError, match=r"is full; no checkpoint is complete yet.*same command again"),
        checkpoint.explain_full_disk(manager),
    ):
        raise ValueError("write failed: No space left on device")


def test_role_files_are_checked(tmp_path):
    tree = {"params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}
    file = role_files.write(tmp_path, "vit", tree)
    equal(role_files.read(tmp_path, file), tree)
    path = tmp_path / file.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="must be the file that was saved"):
        role_files.read(tmp_path, file)
