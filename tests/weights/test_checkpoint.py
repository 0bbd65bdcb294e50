"""Checkpoints: resharding, damage, other architectures, partial reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.runtime import sharding
from dinosae_jax.train import optim
from dinosae_jax.train import state as state_lib
from dinosae_jax.weights import checkpoint, role_files


def make_state(step, width=64):
    params = {"decoder": {"kernel": jnp.arange(width * 8.0).reshape(width, 8) + step}}
    state = state_lib.create(
        params, {"decoder": {}}, {"generator": optim.init(params)}, ("loss",), 0, ("decoder",)
    )
    return state.replace(step=jnp.int32(step))


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        sharding.shardings(jax.eval_shape(lambda s: s, state), mesh),
    )


def save_steps(workdir, steps):
    with checkpoint.open_manager(workdir, keep=3) as manager:
        for step in steps:
            checkpoint.save(manager, make_state(step), {"note": step})
        checkpoint.wait(manager)


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
    monkeypatch.setattr(checkpoint, "_check_sums", full)
    with (
        checkpoint.open_manager(tmp_path, keep=3) as manager,
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        checkpoint.restore_newest(manager, target)
    assert (tmp_path / checkpoint.FOLDER / "1").exists()


def test_checksums_see_one_bit_and_an_exchange():
    state = make_state(3)
    before = checkpoint.checksums(state)
    kernel = np.asarray(state.params["decoder"]["kernel"]).copy()
    flipped = kernel.copy()
    flipped.view(np.uint32)[5, 3] ^= 1
    exchanged = kernel[::-1].copy()
    for changed in (flipped, exchanged):
        other = state.replace(params={"decoder": {"kernel": jnp.asarray(changed)}})
        after = checkpoint.checksums(other)
        differing = {name for name in before if before[name] != after[name]}
        assert differing == {"params/decoder/kernel"}


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
