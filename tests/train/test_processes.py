"""Real processes on this machine, joined by gloo, through the package's entry point."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import sae_stage1
from dinosae_jax.jobs import train
from dinosae_jax.runtime import sharding, stopping
from dinosae_jax.weights import checkpoint
from tests import tiny, xla_flags
from tests.train import recorded_main

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = ("step", "params", "opt", "ema", "extra", "metrics", "key", "skipped")
SMALL = {
    **tiny.TINIEST,
    "steps": 6,
    "log_every": 1,
    "checkpoint.every": 3,
    "eval.every": 100,
    "optimizer.learning_rate": 1e-3,
}


asked_for = pytest.mark.skipif(
    not os.environ.get("DINOSAE_PROCESS_FAULTS"),
    reason="NOT CHECKED: takes minutes on a busy machine; set DINOSAE_PROCESS_FAULTS=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_images(folder)
    return f"folder:{folder}"


@pytest.fixture
def make(data, tmp_path):
    """Returns changes -> the smallest stage's overrides."""
    return lambda **changes: (
        {**SMALL, "data.source": data}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )


def start(overrides, workdir, batches, processes, devices=1, stop_at=(), lie="", second_flags=()):
    """Starts the processes of one run.

    `stop_at` {process: step} lets a process SIGTERM itself there; the second process alone is told
    a lie of `recorded_main`, and gets `second_flags`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    started = []
    for index in range(processes):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags.flags(devices),
            "JAX_PLATFORMS": "cpu",
            "TEST_LIE": lie * (index == 1),
        }
        if processes > 1:
            environment |= {
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_PROCESS_COUNT": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        script = [pathlib.Path(recorded_main.__file__), batches, dict(stop_at).get(index, 0)]
        command = [*script, "--config=configs/sae_stage1.py:tiny", f"--workdir={workdir}", *flags]
        command += second_flags if index == 1 else ()
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started, seconds=900):
    """Waits for all; returns exit codes and outputs. None is left behind."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def run(*arguments, **options):
    """Runs to a clean end and returns what the first process printed."""
    codes, outputs = finish(start(*arguments, **options))
    assert not any(codes), "\n".join(outputs)
    return outputs[0]


def alone(overrides, workdir, batches, stop_at=0):
    """The same run in this process, on its eight devices."""
    config = sae_stage1.get_config("tiny")
    config.update_from_flattened_dict(overrides)
    real = recorded_main.record(batches, stop_at)
    try:
        train.run(config, workdir)
    finally:
        sharding.put_batch = real


def recorded(folder):
    """Global batches in the order of the steps, put together from what the processes held."""
    places = list(folder.iterdir())
    counts = {len(list(place.iterdir())) for place in places}
    assert len(counts) == 1  # every process took as many steps
    batches = []
    for number in range(counts.pop()):
        held = [np.load(place / f"{number}.npz") for place in places]
        order = np.argsort(np.concatenate([each["rows"] for each in held]))
        batches.append(np.concatenate([each["image"] for each in held])[order])
    return batches


def metrics(workdir):
    """Lines of metrics.jsonl that hold training metrics."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "train/loss" in row]


def steps(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def state(workdir):
    return checkpoint.load_fields(checkpoint.newest(workdir), FIELDS)[0]


def assert_close(ours, theirs, count=3):
    """Metrics of the first steps agree to 1e-5 relative (sums are taken in another order)."""
    for row, other in zip(ours[:count], theirs[:count], strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-5), (row["step"], name)


@pytest.mark.slow
def test_two_processes_do_the_work_of_one_and_stop_together(make, tmp_path):
    """SIGTERM to one of two: both save the same step and exit 0."""
    both, one = tmp_path / "both", tmp_path / "one"
    batches = tmp_path / "batches"
    printed = run(make(), both, batches, processes=2, devices=2, stop_at={1: 2})
    assert "sae_stage1 stopped at step 4 of 6; run the same command again" in printed
    assert steps(both) == [3, 4]  # noticed at step 2, agreed on two steps later
    assert not (both / "DONE").exists()
    with pytest.raises(stopping.Interrupted):
        alone(make(), one, tmp_path / "expected", stop_at=4)
    assert_close(metrics(both), metrics(one))
    np.testing.assert_array_equal(recorded(batches), recorded(tmp_path / "expected"))


@pytest.mark.slow
def test_four_processes_do_the_work_of_one(make, tmp_path):
    run(make(steps=3), tmp_path / "four", tmp_path / "batches", processes=4)
    alone(make(steps=3), tmp_path / "one", tmp_path / "expected")
    assert_close(metrics(tmp_path / "four"), metrics(tmp_path / "one"))
    np.testing.assert_array_equal(recorded(tmp_path / "batches"), recorded(tmp_path / "expected"))


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_fewer_devices(make, tmp_path):
    """2 processes x 4 devices, then 4, 2 and 1 devices of one process, then 8 again."""
    parts, one = tmp_path / "parts", tmp_path / "one"
    found = []
    for steps_done, (processes, devices) in enumerate([(2, 4), (1, 4), (1, 2), (1, 1)], start=1):
        batches = tmp_path / f"batches_{steps_done}"
        run(make(steps=steps_done), parts, batches, processes=processes, devices=devices)
        found += recorded(batches)
    saved = state(parts)
    alone(make(steps=5), parts, tmp_path / "batches_5")
    alone(make(steps=5), one, tmp_path / "expected")
    np.testing.assert_array_equal(
        found + recorded(tmp_path / "batches_5"), recorded(tmp_path / "expected")
    )
    assert int(saved["step"]) == 4
    assert_close(metrics(parts), metrics(one))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The workdir of two processes that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    run({**SMALL, "data.source": data, "steps": 16}, folder / "run", folder / "b", processes=2)
    return folder / "run"


def assert_same_run(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, state(ours), state(theirs))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [pytest.param(0, marks=asked_for), 1])
def test_sigterm_to_either_of_two_is_resumed_bitwise(make, straight, tmp_path, stopped):
    workdir = tmp_path / "run"
    changes = make(steps=16)
    codes, outputs = finish(start(changes, workdir, tmp_path / "b", 2, stop_at={stopped: 4}))
    assert codes == [0, 0], "\n".join(outputs)
    assert max(steps(workdir)) == 6
    run(changes, workdir, tmp_path / "rest", processes=2)
    assert_same_run(workdir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=asked_for)])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(make, straight, tmp_path, killed):
    """Kill -9: the survivor ends with an error within JAX's heartbeat timeout, 100 s."""
    workdir = tmp_path / "run"
    changes = make(steps=16)
    both = start(changes, workdir, tmp_path / "b", 2)
    deadline = time.monotonic() + 400
    while checkpoint.newest(workdir) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    both[killed].kill()
    codes, outputs = finish(both, seconds=200)
    assert codes[killed] == -9
    assert codes[1 - killed] != 0, outputs[1 - killed]
    assert not (workdir / "DONE").exists()
    run(changes, workdir, tmp_path / "rest", processes=2)
    assert_same_run(workdir, straight)


def assert_refused(started, message):
    """All processes end with the same sentence."""
    codes, outputs = finish(started, seconds=300)
    assert codes == [2] * len(started), "\n".join(outputs)
    for output in outputs:
        assert message in " ".join(output.split()), output
        assert "Traceback" not in output


@pytest.mark.slow
def test_processes_with_different_configs_end_with_one_sentence(make, tmp_path):
    flags = ["--config.optimizer.learning_rate=2e-3"]
    started = start(make(), tmp_path / "run", tmp_path / "b", 2, second_flags=flags)
    said = "same config and code; got config.optimizer.learning_rate: 0.001 on process 0, 0.002 on"
    assert_refused(started, said)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("unreadable", "Permission denied on process 1;"),
        ("stale_listing", "the same checkpoints; got steps: [3, 6] on process 0, [3] on process 1"),
        ("other_data", "the same weights and data; got data"),
    ],
)
def test_a_process_that_is_told_a_lie_ends_all_and_loses_nothing(make, tmp_path, lie, message):
    workdir = tmp_path / "run"
    run(make(), workdir, tmp_path / "b", processes=2)
    before = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*/metadata")}
    started = start(make(steps=9), workdir, tmp_path / "rest", 2, lie=lie)
    assert_refused(started, message)
    after = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*/metadata")}
    assert after == before


@pytest.mark.slow
def test_a_process_that_is_late_is_waited_for(make, tmp_path):
    workdir = tmp_path / "run"
    run(make(steps=3), workdir, tmp_path / "b", processes=2)
    codes, outputs = finish(start(make(), workdir, tmp_path / "rest", 2, lie="slow"))
    assert codes == [0, 0], "\n".join(outputs)
    assert max(steps(workdir)) == 6


@pytest.mark.slow
@asked_for
@pytest.mark.parametrize(
    ("phase", "processes"),
    [("start", 2), ("restore", 2), ("step", 2), ("save", 2), ("save", 4), ("evaluate", 2)],
)
def test_a_process_killed_in_any_phase_ends_the_others(make, tmp_path, phase, processes):
    """Within JAX's heartbeat timeout; the run then goes on as if nothing had happened."""
    changes = make(steps=8, eval__every=5)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    run(changes, whole, tmp_path / "w", processes)
    run(changes, workdir, tmp_path / "a", processes, stop_at={0: 2})  # saved at step 4
    lie = f"dies_in_{phase}"
    codes, outputs = finish(start(changes, workdir, tmp_path / "b", processes, lie=lie), 300)
    assert codes[1] == -9
    assert all(codes), "\n".join(outputs)
    run(changes, workdir, tmp_path / "c", processes)
    assert_same_run(workdir, whole)


@pytest.mark.slow
@asked_for
def test_the_first_process_sets_a_damaged_checkpoint_aside_for_all(make, tmp_path):
    workdir = tmp_path / "run"
    run(make(), workdir, tmp_path / "b", processes=2)
    for record in (workdir / "checkpoints" / "6").rglob("metadata"):
        record.write_text("{")
    (workdir / "DONE").unlink()
    printed = run(make(), workdir, tmp_path / "rest", processes=2)
    assert printed.count("The checkpoint of step 6 is damaged") == 1
    assert "resumes from step 3" in printed
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"3", "6", "6.damaged"}
