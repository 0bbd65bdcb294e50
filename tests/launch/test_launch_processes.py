"""What of the launchers can run here, run for real: processes, signals, git and shell text.

`dinosae_jax.main` is a stub package in a temporary folder, so that no test waits for JAX.
"""

import pathlib
import shlex
import signal
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
RUN = [
    "run",
    "--config=configs/rfm_dit.py:tiny",
    "--workdir=gs://bucket/first",
    "--config.note=it's 5",
]


def wait_for(condition) -> None:
    """Polls for at most 30 s; the scripts react within milliseconds on a quiet machine."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_setup_brings_the_stated_revision_of_the_repository(sandbox):
    origin = sandbox.folder / "origin"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(origin)]
    origin.mkdir()
    subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
    for text in ("first", "second"):
        (origin / "file").write_text(text)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", text], check=True)
    subprocess.run([*git, "tag", "v1", "HEAD~1"], check=True)
    # stands for `python -m venv .venv`: it leaves a .venv/bin/python that records its arguments
    sandbox.fake(
        "python3.12",
        f"#!/bin/bash\nmkdir -p .venv/bin && cp {sandbox.fakes}/gcloud .venv/bin/python\n",
    )
    checkout = sandbox.folder / "my checkout"
    variables = {"CHECKOUT": str(checkout), "PYTHON": "python3.12", "REPO_URL": str(origin)}
    for revision, text in (("v1", "first"), ("main", "second")):
        done = sandbox.bash(LAUNCH / "slurm.sh", "setup", REVISION=revision, **variables)
        assert done.returncode == 0, done.stderr
        assert (checkout / "file").read_text() == text
        pip = ["python", "-m", "pip", "install", "--quiet", "--editable", ".[cuda]"]
        assert sandbox.calls()[-1] == pip


def make_stub(folder: pathlib.Path, text: str) -> None:
    """A package dinosae_jax whose main runs `text` in place of training."""
    (folder / "dinosae_jax").mkdir(parents=True, exist_ok=True)
    (folder / "dinosae_jax/__init__.py").write_text("")
    (folder / "dinosae_jax/main.py").write_text(text)


ECHO = """
import os, sys
names = ["COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_ID", "PLATFORMS", "LOCAL_DEVICE_IDS"]
print(*(os.environ.get("JAX_" + name) for name in names), *sys.argv[1:])
"""
SAVES_ON_SIGTERM = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved" + os.environ.get("JAX_PROCESS_ID", "")).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready" + os.environ.get("JAX_PROCESS_ID", "")).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("device", "tails"), [("cpu", ["cpu None", "cpu None"]), ("gpu", ["cuda,cpu 0", "cuda,cpu 1"])]
)
def test_local_starts_two_processes_that_know_their_places(device, tails, local):
    make_stub(local.folder, ECHO)
    variables = {"PROCESSES": "2", "DEVICE": device, "PORT": "12345"}
    done = local.bash(LAUNCH / "local.sh", *RUN, **variables)
    assert done.returncode == 0, done.stderr
    lines = [f"127.0.0.1:12345 2 {i} {tails[i]} " + " ".join(RUN[1:]) for i in range(2)]
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {line}" for i, line in enumerate(lines)]

    dry = local.bash(LAUNCH / "local.sh", "--dry-run", *RUN, **variables)
    replayed = local.bash("-c", dry.stdout)
    assert sorted(replayed.stdout.splitlines()) == lines


def test_local_ends_the_other_process_when_one_fails(local):
    fails = "import os, sys\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    make_stub(local.folder, fails + SAVES_ON_SIGTERM.replace("60", "30"))
    started = time.monotonic()
    done = local.bash(LAUNCH / "local.sh", *RUN, PROCESSES="2", DEVICE="cpu")
    assert time.monotonic() - started < 25  # process 0 alone would sleep for 30 s
    assert done.returncode == 7


def test_local_passes_sigterm_on_and_reports_a_clean_end(local):
    make_stub(local.folder, SAVES_ON_SIGTERM)
    job = local.start(LAUNCH / "local.sh", *RUN, PROCESSES="2", DEVICE="cpu")
    wait_for(lambda: all((local.folder / f"ready{i}").exists() for i in range(2)))
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert all((local.folder / f"saved{i}").exists() for i in range(2))


def test_restartable_tells_stopped_from_finished_and_from_failed(local):
    script = LAUNCH / "restartable.sh"
    for code in (0, 3):
        assert local.bash(script, "bash", "-c", f"exit {code}").returncode == code
    make_stub(local.folder, SAVES_ON_SIGTERM)
    job = local.start(script, "python", "-m", "dinosae_jax.main")
    wait_for((local.folder / "ready").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    assert (local.folder / "saved").exists()


@pytest.mark.parametrize("signalled", [False, True], ids=["finished", "time is up"])
def test_the_batch_script_saves_and_requeues_when_its_time_is_up(signalled, local):
    make_stub(local.folder, SAVES_ON_SIGTERM if signalled else ECHO)
    (local.folder / ".venv/bin").mkdir(parents=True)
    (local.folder / ".venv/bin/activate").write_text("")
    local.fake("srun", '#!/bin/bash\necho "$$" >srun.pid\necho "$@" >srun.words\nexec "${@:3}"\n')
    # the step's processes get the signal, as with the real scancel
    local.fake("scancel", local.recorder + 'kill "${1/--signal=/-}" "$(cat srun.pid)"\n')
    variables = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "12"}
    job = local.start(LAUNCH / "slurm.sbatch", *RUN[1:], **variables)
    if signalled:
        wait_for((local.folder / "ready").exists)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    words = (local.folder / "srun.words").read_text().split()
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=12", "python"]
    stopped = [["scancel", "--signal=TERM", "42"], ["scontrol", "requeue", "42"]]
    assert local.calls() == (stopped if signalled else [])
    assert (local.folder / "saved").exists() == signalled


def test_the_text_sent_to_a_tpu_vm_starts_one_run_and_stops_it(local):
    checkout = local.folder / "dinosae_jax"
    make_stub(checkout, SAVES_ON_SIGTERM)
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").write_text("")
    (local.fakes / "tail").unlink()
    tpu = {"TPU_NAME": "slice", "PROJECT_ID": "project", "ZONE": "zone-a"}

    def remote(*arguments: str) -> subprocess.CompletedProcess:
        dry = local.bash(LAUNCH / "tpu_vm.sh", "--dry-run", *arguments, **tpu)
        return local.bash("-c", shlex.split(dry.stdout)[-1].removeprefix("--command="))

    assert remote(*RUN).returncode == 0
    wait_for((checkout / "ready").exists)
    again = remote(*RUN)
    assert (again.returncode, again.stderr) == (1, "a run is going on here: stop it first\n")
    assert remote("stop").returncode == 0
    assert (checkout / "saved").exists()
