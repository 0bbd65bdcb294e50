"""The start of a job: threads for forced devices, and a start by hand that is incomplete."""

import os

import pytest

from dinosae_jax.train import distributed


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


def test_a_start_by_hand_needs_every_variable(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_COUNT", "2")
    with pytest.raises(ValueError, match="missing JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        distributed.start()
