"""Runs in a bucket through faults, until each is done; they must end as the undisturbed one.

    python -m tests.buckets.faults gs 200 [SEED]

Requests fail, hang up, lose their answer or are cut short by a seeded plan; runs are killed; the
server is killed and away for 20 s (that of S3 keeps nothing: it is only out of reach). A run that
stops must say why in one line. It is started again until it is done, and must then be bitwise the
one that nobody disturbed. A checkpoint that was announced must still be there. A run is a loop
without a model: it writes all that a stage of training writes into its workdir, with the code of
training.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

from tests.buckets import proxy, servers

RATE = 0.06  # of the requests of a disturbed run
AWAY = 20.0  # seconds
STEPS = 6
MOST_STARTS = 15


def train(place):
    """Goes on from the newest checkpoint to the last step, as `train.loop` does."""
    import jax

    from dinosae_jax.runtime import files, lease
    from dinosae_jax.train import metric_writer
    from dinosae_jax.weights import checkpoint
    from tests.weights import faults

    folder = files.path(place)
    with lease.hold(folder), checkpoint.open_manager(folder, keep=2) as manager:
        target = faults.abstract(faults.make_state(0), faults.sharding.make_mesh(1))
        found = checkpoint.restore_newest(manager, target)
        if not found and (lost := checkpoint.lost_work(folder)):
            raise AssertionError(f"no checkpoint, but {lost}")
        if not found:
            checkpoint.note_newest(folder, None)
        state = found[0] if found else faults.make_state(0)
        writer = metric_writer.RunWriter(folder, int(state.step))
        for step in range(int(state.step) + 1, STEPS + 1):
            params = jax.tree.map(lambda leaf: leaf * 0.5 + 1.0, state.params)
            state = state.replace(step=state.step + 1, params=params)
            writer.metrics(step, {"mean": float(params["decoder"]["kernel"].mean())})
            checkpoint.save(manager, state, {"note": step}, writer.publish)
        writer.publish()
        checkpoint.wait(manager)
        writer.close()
        files.write_json(folder / "DONE", {"step": STEPS})


def compare(ours, theirs, done):
    """Raises AssertionError where a run is not as it should be by now."""
    import jax
    import numpy as np

    from dinosae_jax.runtime import files, snapshots
    from dinosae_jax.weights import checkpoint

    folders = [files.path(place) for place in (ours, theirs)]
    noted, newest = folders[0] / checkpoint.NEWEST, checkpoint.newest(folders[0])
    step = json.loads(noted.read_text())["step"] if noted.exists() else None
    there = int(newest.name) if newest else -1
    assert step is None or there >= step, f"step {step} was announced, {there} is there"
    if done:
        places = [snapshots.local(checkpoint.newest(folder)) for folder in folders]
        states = [checkpoint.load_fields(place, ("step", "params", "ema"))[0] for place in places]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states))), "another state"
        lines = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
        assert lines[0] == lines[1], "other lines of metrics"


def nursery():
    """Forks a process for each line of standard input, which shares what was imported here."""
    from dinosae_jax import main
    from dinosae_jax.runtime import lease  # noqa: F401  (imported once, for all)
    from dinosae_jax.train import metric_writer  # noqa: F401
    from dinosae_jax.weights import checkpoint  # noqa: F401

    for line in sys.stdin:
        name, *arguments = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)
            continue
        code = 0
        try:
            {"train": train, "compare": compare}[name](*arguments)
        except Exception as error:
            mistake = main._is_mistake(error)
            code = 2 if mistake else 1
            kind = "dinosae_jax: " if mistake else f"{type(error).__name__}: "
            pathlib.Path(os.environ["SAID"]).write_text(kind + " ".join(str(error).split()))
        os._exit(code)


class Nursery:
    """The process that forks, and what its children said."""

    def __init__(self, folder):
        self.said = folder / "said"
        words = [sys.executable, "-c", "from tests.buckets import faults; faults.nursery()"]
        environment = os.environ | {"SAID": str(self.said)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        log = (folder / "log").open("a")
        self.process = subprocess.Popen(words, env=environment, stderr=log, **pipes)

    def run(self, *call, disturb=lambda pid: None):
        """(exit code, what was said) of a call in a process of its own."""
        self.said.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        pid = self.number()
        other = threading.Thread(target=disturb, args=(pid,))
        other.start()
        code = self.number()
        other.join()
        return code, self.said.read_text() if self.said.exists() else ""

    def number(self):
        """The next number that the process prints, among the lines of its children."""
        while True:
            line = self.process.stdout.readline().strip()
            if line.lstrip("-").isdecimal():
                return int(line)


def disturbance(kind, server, between, delay):
    """What kills a run, or the server for a while."""

    def disturb(pid):
        time.sleep(delay)
        if kind == "kill":
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return
        if kind == "away":
            between.away = True
            if server.scheme == "gs":
                server.kill()
            time.sleep(AWAY)
            if server.scheme == "gs":
                server.start()
            between.away = False

    return disturb


def run(scheme, total, seed, folder):
    """Prints a row for each run; returns how many ended badly."""
    draw, server = random.Random(seed), servers.Server(scheme, folder / "bucket")
    between = proxy.Proxy(server.port)
    server.url = between.url
    server.start()
    os.environ.update(server.environment())
    os.environ |= {"JAX_PLATFORMS": "cpu", "DINOSAE_CACHE": str(folder / "copies")}
    root, bad, number, faults = f"{scheme}://{servers.BUCKET}", 0, 0, 0
    children = Nursery(folder)
    began = time.monotonic()
    print("undisturbed:", *children.run("train", f"{root}/whole"), flush=True)
    took = time.monotonic() - began
    while faults < total:
        number, before, starts, said, wrong, code = number + 1, between.faults, [], [], "", None
        while code != 0 and len(starts) < MOST_STARTS and not wrong:
            starts.append(draw.choice(("-", "-", "kill", "kill", "away")))
            between.plan = proxy.seeded(draw.random(), RATE)
            disturb = disturbance(starts[-1], server, between, draw.uniform(0, took))
            code, line = children.run("train", f"{root}/run{number}", disturb=disturb)
            between.plan = lambda method, path: ""
            if code not in (0, -signal.SIGKILL):
                said.append(line[:300])
                wrong = "" if line.startswith("dinosae_jax: ") else f"{code}: {line}"
            checked = children.run("compare", f"{root}/run{number}", f"{root}/whole", code == 0)
            wrong = wrong or (checked[1] if checked[0] else "")
        wrong = wrong or ("" if code == 0 else "never done")
        bad += bool(wrong)
        failed = between.faults - before
        faults += failed + len(starts) - starts.count("-")
        row = {"run": number, "requests failed": failed, "starts": starts, "said": said}
        print(json.dumps(row | {"wrong": wrong}), f"{faults}/{total}", flush=True)
    server.kill()
    children.process.kill()
    print(f"{faults} faults in {number} runs: {number - bad} ended as the undisturbed one")
    return bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
        sys.exit(run(sys.argv[1], int(sys.argv[2]), seed, pathlib.Path(place)) > 0)
