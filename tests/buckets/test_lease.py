"""A workdir in a bucket belongs to one run at a time, as one on a disk does."""

import functools
import subprocess
import sys

import pytest

from dinosae_jax.runtime import buckets, files, lease
from tests.runtime import leases

pytestmark = pytest.mark.slow


def foreign(folder, age, monkeypatch):
    """A lease of another machine, of that age; ours are new."""
    files.write_json(folder / lease.FILE, leases.OWNER)
    ours_are_new = lambda path: age * (lease._read(path) == leases.OWNER)  # noqa: E731
    monkeypatch.setattr(lease, "_age", ours_are_new)


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
    with leases.start(folder) as first:
        assert first.stdout.readline() == "held\n"
        first.kill()
    with lease.hold(folder):
        pass
    assert "which has ended" in capsys.readouterr().out


def test_of_many_that_take_over_one_wins(folder, monkeypatch):
    foreign(folder, lease.STALE + 1, monkeypatch)
    tokens = leases.take_at_once(folder, 6)
    assert len(tokens) == 1
    assert lease._read(folder / lease.FILE)["token"] in tokens


def test_a_run_whose_lease_was_taken_over_ends(folder, monkeypatch, capsys):
    take_over = functools.partial(foreign, folder, 0.0, monkeypatch)
    assert leases.ends_when_taken_over(folder, monkeypatch, take_over, 0.05, 30)
    assert "was taken over by process 7 on elsewhere" in capsys.readouterr().err
    assert lease._read(folder / lease.FILE)["token"] == "theirs"


RACE = """
import sys
from dinosae_jax.runtime import files, lease
for number in range(int(sys.argv[2])):
    folder = files.path(f"{sys.argv[1]}/{number}")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        lease._held.clear()
        print("won" if lease._take(folder) else "none", flush=True)
    except ValueError as error:
        print("which process" in str(error) and "is using" in str(error), flush=True)
    sys.stdin.readline()
"""
TRIES = 20


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_of_two_runs_at_once_one_goes_on(place, folder, tmp_path):
    root = folder if place == "bucket" else tmp_path
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = []
    for _ in range(2):
        words = [sys.executable, "-c", RACE, str(root), str(TRIES)]
        both.append(subprocess.Popen(words, **pipes))
    won = []
    for _ in range(TRIES):
        for line in ("ready\n", None):
            said = [run.stdout.readline() for run in both]
            assert line is None or said == [line, line]
            for run in both:
                run.stdin.write("\n")
                run.stdin.flush()
        won.append(sorted(said))
    for run in both:
        run.wait(timeout=60)
    assert won == [["True\n", "won\n"]] * TRIES


def test_the_age_is_told_by_the_clock_of_the_bucket(folder):
    with lease.hold(folder):
        assert 0.0 <= lease._age(folder / lease.FILE) < 30
