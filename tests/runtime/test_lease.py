"""Who may use a workdir: one run at a time, and the next one when its owner is gone."""

import functools
import json
import os
import signal

import pytest

from dinosae_jax.runtime import lease
from tests.runtime import leases


def read(folder):
    return json.loads((folder / lease.FILE).read_text())


def foreign(folder, age=0.0, **changes):
    """A lease of another machine, or with `changes`."""
    path = folder / lease.FILE
    path.write_text(json.dumps(leases.OWNER | changes))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


def test_a_lease_is_held_and_released(tmp_path):
    folder = tmp_path / "new"
    with lease.hold(folder):
        assert read(folder)["pid"] == os.getpid()
        with lease.hold(folder):  # a chain's stage in the same folder
            pass
        assert read(folder)["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    with leases.start(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"which process {first.pid} on .* is using; wait"):
            lease._take(tmp_path)
        first.kill()
    with lease.hold(tmp_path):  # it has ended, so nobody has to wait
        assert read(tmp_path)["pid"] == os.getpid()


def test_ctrl_c_releases_the_lease(tmp_path):
    before = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "terminal.end_on_keyboard()\n"
    )
    with leases.start(tmp_path, before, "while True: time.sleep(0.01)") as owner:
        assert owner.stdout.readline() == "held\n"
        owner.send_signal(signal.SIGINT)
        assert owner.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_is_told_from_a_process_that_has_its_number(tmp_path, capsys):
    foreign(tmp_path, machine=lease._machine(), pid=os.getpid(), process_start="0")
    with lease.hold(tmp_path):
        pass
    assert f"is taken over from process {os.getpid()} on elsewhere" in capsys.readouterr().out


def test_a_lease_of_another_machine_is_believed_while_it_is_fresh(tmp_path, capsys):
    foreign(tmp_path)
    with pytest.raises(ValueError, match="process 7 on elsewhere"):
        lease._take(tmp_path)
    foreign(tmp_path, age=lease.STALE + 1)
    with lease.hold(tmp_path):
        assert read(tmp_path)["host"] != "elsewhere"
    assert "gave no sign for 61 s" in capsys.readouterr().out


def test_a_quiet_owner_gets_time_to_give_a_sign(tmp_path, monkeypatch, capsys):
    foreign(tmp_path, age=lease.STALE - 2)
    with lease.hold(tmp_path):
        pass
    said = capsys.readouterr().out
    assert said.index("waiting up to") < said.index("is taken over")
    foreign(tmp_path, age=lease.STALE - 2)
    monkeypatch.setattr(lease.time, "sleep", lambda _: os.utime(tmp_path / lease.FILE))
    with pytest.raises(ValueError, match="is using"):
        lease._take(tmp_path)


def test_of_many_that_take_over_one_wins(tmp_path):
    foreign(tmp_path, age=lease.STALE + 1)
    assert leases.take_at_once(tmp_path, 8) == {read(tmp_path)["token"]}


def test_a_run_whose_lease_was_taken_over_ends(tmp_path, monkeypatch, capsys):
    take_over = functools.partial(foreign, tmp_path)
    assert leases.ends_when_taken_over(tmp_path, monkeypatch, take_over, 0.01, 10)
    assert "was taken over by process 7 on elsewhere" in capsys.readouterr().err
    assert read(tmp_path)["token"] == "theirs"
