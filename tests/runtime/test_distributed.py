"""The start of a job: who is asked for the other processes, and starts that are incomplete."""

import os

import jax
import pytest

from dinosae_jax.runtime import distributed


@pytest.mark.parametrize(
    ("flags", "threads"),
    [
        ("--xla_force_host_platform_device_count=8", "32"),
        ("--xla_force_host_platform_device_count=1", None),
        ("", None),
    ],
)
def test_forced_devices_get_spare_threads(monkeypatch, flags, threads):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("XLA_FLAGS", flags)
    distributed.spare_threads()
    assert os.environ.get("NPROC") == threads


def test_a_number_of_threads_that_was_given_stays(monkeypatch):
    monkeypatch.setenv("NPROC", "5")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    distributed.spare_threads()
    assert os.environ["NPROC"] == "5"


@pytest.fixture
def cache_dir(monkeypatch):
    """Sets and reads the folder of JAX's cache, which is put back afterwards."""
    before = jax.config.jax_compilation_cache_dir

    def cache_dir(*folder):
        if folder:
            jax.config.update("jax_compilation_cache_dir", folder[0])
        return jax.config.jax_compilation_cache_dir

    yield cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_caches_are(cache_dir, monkeypatch, tmp_path):
    cache_dir(None)
    distributed.keep_programs("")
    assert cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(distributed.platform, "node", lambda: "here")
    distributed.keep_programs("auto")
    assert cache_dir() == str(tmp_path / "dinosae_jax" / "cpu-here")
    distributed.keep_programs("auto")  # what was set stays, by JAX_COMPILATION_CACHE_DIR too
    distributed.keep_programs("/elsewhere")
    assert cache_dir() == "/elsewhere"
    distributed.keep_programs("auto")
    assert cache_dir() == "/elsewhere"


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of jax.distributed.initialize; no variable indicates several."""
    for name in (*distributed.MANUAL, *distributed.COUNTS, *distributed.HOSTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: found.append(options))
    return found


def set_variables(monkeypatch, text):
    for word in text.split():
        monkeypatch.setenv(*word.split("=", 1))


@pytest.mark.parametrize(
    ("variables", "platforms", "joins"),
    [
        ("", "cpu", False),
        ("SLURM_NTASKS=1", "cuda,cpu", False),
        ("SLURM_NTASKS=4", "cuda,cpu", True),
        ("OMPI_COMM_WORLD_SIZE=2", "cpu", True),
        ("TPU_WORKER_HOSTNAMES=a,b TPU_SKIP_MDS_QUERY=1", "tpu,cpu", True),
        ("TPU_WORKER_HOSTNAMES=a TPU_SKIP_MDS_QUERY=1", "tpu,cpu", False),
        ("TPU_WORKER_HOSTNAMES=a MEGASCALE_NUM_SLICES=2 TPU_SKIP_MDS_QUERY=1", "tpu,cpu", True),
        ("TPU_PROCESS_ADDRESSES=local TPU_SKIP_MDS_QUERY=1", "tpu,cpu", False),
        ("", "tpu,cpu", True),  # a Cloud TPU VM sets no variable at all
        ("JOB_COMPLETION_INDEX=3", "cuda,cpu", False),  # an index is no number of processes
    ],
)
def test_jax_is_asked_for_a_cluster(monkeypatch, calls, variables, platforms, joins):
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
    distributed.start()
    assert calls == [{}] * joins


def test_a_start_by_hand_asks_no_cluster(monkeypatch, calls):
    by_hand = "JAX_COORDINATOR_ADDRESS=a:1 JAX_PROCESS_COUNT=2 JAX_PROCESS_ID=1 SLURM_NTASKS=2"
    set_variables(monkeypatch, by_hand)
    distributed.start()
    assert calls == [
        {
            "coordinator_address": "a:1",
            "num_processes": 2,
            "process_id": 1,
            "cluster_detection_method": "deactivate",
        }
    ]


BY_HAND = "JAX_COORDINATOR_ADDRESS={} JAX_PROCESS_COUNT={} JAX_PROCESS_ID={}"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("JAX_PROCESS_COUNT=2", "got no JAX_COORDINATOR_ADDRESS and no JAX_PROCESS_ID"),
        (BY_HAND.format("host", 2, 0), "JAX_COORDINATOR_ADDRESS=HOST:PORT .*; got host, 2 and 0"),
        (BY_HAND.format("host:1", "two", 0), "got host:1, two and 0"),
        (BY_HAND.format("host:1", 2, 2), "an index from 0 below it; got host:1, 2 and 2"),
        (BY_HAND.format("host:1", 2, -1), "an index from 0 below it; got host:1, 2 and -1"),
    ],
)
def test_a_wrong_start_by_hand_is_refused(monkeypatch, calls, variables, message):
    set_variables(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        distributed.start()
    assert not calls


def raising(error):
    def initialize(**_):
        raise error

    return initialize


def test_processes_that_were_not_started_as_such_are_refused(monkeypatch, calls):
    set_variables(monkeypatch, "SLURM_NTASKS=8")  # in an allocation, without srun
    error = ValueError("coordinator_address should be defined.")
    monkeypatch.setattr(jax.distributed, "initialize", raising(error))
    with pytest.raises(ValueError, match=r"SLURM_NTASKS=8 indicates several .* each with srun"):
        distributed.start()


def test_chips_without_a_slice_run_alone(monkeypatch, calls):
    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu")
    monkeypatch.setattr(jax.distributed, "initialize", raising(OSError("no metadata server")))
    distributed.start()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"the TPU indicates several .*no metadata server"):
        distributed.start()


def test_processes_that_do_not_meet_are_refused_in_one_line(monkeypatch, calls):
    set_variables(monkeypatch, BY_HAND.format("host:1", 2, 1))
    error = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nobody there\nmore")
    monkeypatch.setattr(jax.distributed, "initialize", raising(error))
    with pytest.raises(ValueError, match="find each other; got DEADLINE_EXCEEDED: nobody there"):
        distributed.start()
