"""A workdir in a bucket belongs to one run at a time, as one on a disk does."""

import subprocess
import sys
import threading

import pytest

from dinosae_jax.runtime import buckets, files, lease

pytestmark = pytest.mark.slow

HOLD = (
    "import sys\nfrom dinosae_jax.runtime import files, lease\n"
    "with lease.hold(files.path(sys.argv[1])):\n    print('held', flush=True); input()"
)


def start(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True, **pipes)


def foreign(folder, age, monkeypatch):
    """A lease of another machine, of that age; ours are new."""
    owner = {
        "token": "theirs",
        "host": "elsewhere",
        "machine": "other",
        "pid": 7,
        "process_start": "1",
        "since": "yesterday",
    }
    files.write_json(folder / lease.FILE, owner)
    monkeypatch.setattr(lease, "_age", lambda path: age * (lease._read(path) == owner))


def test_a_lease_is_held_and_given_back(folder):
    with lease.hold(folder):
        assert b"token" in (folder / lease.FILE).read_bytes()
        with lease.hold(folder):
            pass
        with pytest.raises(ValueError, match="is using"):
            held = set(lease._held)
            lease._held.clear()
            try:
                lease._take(folder)
            finally:
                lease._held.update(held)
    assert buckets.read_version(folder / lease.FILE)[0] == lease.FREE
    with lease.hold(folder):
        pass


def test_a_run_that_was_killed_is_taken_over_at_once(folder, capsys):
    with start(folder) as first:
        assert first.stdout.readline() == "held\n"
        first.kill()
    with lease.hold(folder):
        pass
    assert "which has ended" in capsys.readouterr().out


def test_of_many_that_take_over_one_wins(folder, monkeypatch):
    foreign(folder, lease.STALE + 1, monkeypatch)
    barrier, won = threading.Barrier(6), []

    def take():
        barrier.wait()
        try:
            won.append(lease._take(folder))
        except ValueError:
            won.append(None)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = set(filter(None, won))
    assert len(tokens) == 1
    assert lease._read(folder / lease.FILE)["token"] in tokens
    lease._held.difference_update(tokens)


def test_a_run_whose_lease_was_taken_over_ends(folder, monkeypatch, capsys):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(lease.distributed, "abandon", lambda code: ended.set())
    with lease.hold(folder):
        foreign(folder, 0.0, monkeypatch)
        assert ended.wait(30)
    assert "was taken over by process 7 on elsewhere" in capsys.readouterr().err
    assert lease._read(folder / lease.FILE)["token"] == "theirs"


def test_the_age_is_told_by_the_clock_of_the_bucket(folder):
    with lease.hold(folder):
        assert 0.0 <= lease._age(folder / lease.FILE) < 30
