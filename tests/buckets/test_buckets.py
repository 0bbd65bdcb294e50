"""Objects: written whole, by conditions, through faults; errors in one sentence."""

import threading

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dinosae_jax.runtime import buckets, distributed, files, untrusted
from tests.buckets import proxy

pytestmark = pytest.mark.slow


def test_files_are_read_as_they_were_last_written(folder):
    assert not folder.is_dir() and files.names_in(folder) == []
    for number in range(3):
        files.write_json(folder / "a.json", {"number": number})
        assert untrusted.read_json(folder / "a.json", "") == {"number": number}
    files.write_bytes(folder / "b" / "c", b"123")
    assert sorted(files.names_in(folder)) == ["a.json", "b"]
    assert files.folders_in(folder) == ["b"]
    assert sorted(buckets.listing(folder)) == ["a.json", "b/c"]
    assert files.size(folder / "b" / "c") == 3
    assert files.read_range(str(folder / "b" / "c"), 1, 1) == b"2"
    assert files.matching(f"{folder}/*.json") == [f"{folder}/a.json"]
    assert files.modified(folder / "a.json") <= files.modified(folder / "b" / "c")


def test_nothing_is_published_where_writing_fails(folder):
    with pytest.raises(RuntimeError), files.publishing(folder / "a") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert files.names_in(folder) == []


def test_a_write_on_a_condition_is_done_by_one(folder):
    place = folder / "x"
    assert buckets.read_version(place) == (b"", None)
    assert buckets.write_if(place, b"1", None)
    assert not buckets.write_if(place, b"2", None)
    found, version = buckets.read_version(place)
    assert found == b"1"
    assert buckets.write_if(place, b"3", version)
    assert not buckets.write_if(place, b"4", version)
    assert buckets.read_version(place)[0] == b"3"


@pytest.mark.parametrize("kind", proxy.KINDS)
def test_faults_that_pass_are_retried(folder, between, kind, capsys):
    faults = iter([kind, "", kind, kind])
    between.plan = lambda method, path: next(faults, "")
    for number in range(3):
        files.write_bytes(folder / "a", bytes([number]) * 1000)
        assert (folder / "a").read_bytes() == bytes([number]) * 1000


def test_a_fault_that_lasts_is_said_in_a_line(folder, between, capsys):
    left = iter(["503"] * 4)
    between.plan = lambda method, path: next(left, "")
    buckets.set_up()
    buckets._Retries.said = -buckets.SILENCE
    files.write_bytes(folder / "a", b"1")
    assert capsys.readouterr().out.count("does not answer well, trying again") <= 1
    assert (folder / "a").read_bytes() == b"1"


def test_a_bucket_that_is_away_for_20_seconds_is_waited_for(folder, between, monkeypatch):
    files.write_bytes(folder / "a", b"1")
    monkeypatch.setattr(between, "away", True)
    threading.Timer(20.0, setattr, (between, "away", False)).start()
    files.write_bytes(folder / "a", b"2")
    assert (folder / "a").read_bytes() == b"2"


def test_a_missing_permission_is_one_sentence(folder, between):
    between.plan = lambda method, path: "403"
    with pytest.raises(OSError) as caught:
        files.write_bytes(folder / "a", b"1")
    message = str(caught.value)
    assert str(folder) in message and "permission, docs/cloud.md says which" in message
    assert "\n" not in message


def test_compiled_programs_are_kept_in_a_bucket(folder):
    before = jax.config.jax_compilation_cache_dir
    try:
        distributed.keep_programs(f"{folder}/programs")
        compilation_cache.reset_cache()
        jax.jit(lambda x: x * 3 + 1)(2.0)
        assert any(name.endswith("-cache") for name in buckets.listing(folder / "programs"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
