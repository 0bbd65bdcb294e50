"""Copies of what buckets hold: made once, of one version, within a limit."""

import threading

import pytest

from dinosae_jax.runtime import buckets, files, snapshots

pytestmark = pytest.mark.slow


def fill(folder, size=1000):
    for name in ("a", "b/c"):
        files.write_bytes(folder / name, name.encode() * size)


def test_a_copy_is_made_once_and_again_where_an_object_changed(folder, between):
    fill(folder)
    first = snapshots.local(folder)
    assert (first / "b" / "c").read_bytes() == b"b/c" * 1000
    assert first.name == folder.name
    asked = []
    between.plan = lambda method, path: asked.append(path) or ""
    assert snapshots.local(folder) == first
    assert not [path for path in asked if "alt=media" in path]
    files.write_bytes(folder / "a", b"new")
    assert (snapshots.local(folder) / "a").read_bytes() == b"new"


def test_some_files_and_a_single_one(folder):
    fill(folder)
    assert files.names_in(snapshots.local(folder, ["a"])) == ["a"]
    assert snapshots.local(folder / "a").read_bytes() == b"a" * 1000
    with pytest.raises(FileNotFoundError):
        snapshots.local(folder / "none")


def test_an_object_whose_name_leads_elsewhere_is_refused(folder, monkeypatch):
    found = {"a": buckets.Object(1, "1"), "../../b": buckets.Object(1, "1")}
    monkeypatch.setattr(buckets, "listing", lambda path: found)
    with pytest.raises(ValueError, match="lie below their folder"):
        snapshots.local(folder)


def test_what_does_not_fit_is_refused(folder, monkeypatch):
    fill(folder)
    monkeypatch.setenv(snapshots.GIBIBYTES, str(1000 / 2**30))
    with pytest.raises(ValueError, match=r"copied to .*; got 0.0 GiB of .*; set DINOSAE_CACHE_GIB"):
        snapshots.local(folder)


def test_the_copy_that_was_not_used_for_longest_makes_room(folder, cache, monkeypatch):
    fill(folder / "x")
    old = snapshots.local(folder / "x")
    snapshots._use.cache_clear()  # as after the end of the process that used it
    fill(folder / "y")
    monkeypatch.setenv(snapshots.GIBIBYTES, str(6000 / 2**30))
    new = snapshots.local(folder / "y")
    assert new.exists() and not old.exists()


def test_a_copy_in_use_is_not_removed(folder, monkeypatch):
    fill(folder / "x")
    old = snapshots.local(folder / "x")
    fill(folder / "y")
    monkeypatch.setenv(snapshots.GIBIBYTES, str(6000 / 2**30))
    snapshots.local(folder / "y")
    assert old.exists()


def test_many_that_copy_at_once_get_the_same(folder, between):
    fill(folder)
    downloads, found = [], []
    between.plan = lambda method, path: downloads.append(path) or ""
    threads = [
        threading.Thread(target=lambda: found.append(snapshots.local(folder))) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
