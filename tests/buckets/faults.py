"""Runs in a bucket through faults, until each is done; they must end as the undisturbed one.

    python -m tests.buckets.faults gs 200 [SEED]

Requests fail, hang up, lose their answer or are cut short by a seeded plan; runs are killed; the
server is killed and away for 20 s. A run that stops must say why in one line. It is started again
until it is done, and must then be bitwise that of the bucket in which nothing failed. A checkpoint
that was announced must still be there.
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

RATE = 0.04  # of the requests of a disturbed run
AWAY = 20.0  # seconds
FIELDS = {
    "steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint.every": 1,
    "eval.every": 3,
    "eval.images": 8,
    "eval.batch_size": 8,
    "data.threads": 0,
    "data.image_size": 32,
    "model.decoder.width_list": "(8, 8, 16, 16, 32)",
}
COMPARE = """
import json, sys, jax, numpy as np
from dinosae_jax.runtime import files, snapshots
from dinosae_jax.weights import checkpoint
from tests.train.kills import FIELDS
ours, theirs, done = files.path(sys.argv[1]), files.path(sys.argv[2]), sys.argv[3] == 'done'
noted = ours / checkpoint.NEWEST
step = json.loads(noted.read_text())['step'] if noted.exists() else None
newest = checkpoint.newest(ours)
if step is not None and (newest is None or int(newest.name) < step):
    sys.exit(f'step {step} was announced, {newest} is there')
if done:
    places = [snapshots.local(checkpoint.newest(folder)) for folder in (ours, theirs)]
    states = [checkpoint.load_fields(place, FIELDS)[0] for place in places]
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, *states))):
        sys.exit('another state')
    lines = [(f / 'metrics.jsonl').read_bytes() for f in (ours, theirs)]
    if lines[0] != lines[1]:
        sys.exit('other lines of metrics')
"""


def command(workdir):
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    start = [sys.executable, "-m", "dinosae_jax.main", "--config=configs/sae_stage1.py:tiny"]
    return [*start, f"--workdir={workdir}", *flags]


def check(ours, theirs, state):
    """What is wrong with a run by now, or ''."""
    words = [sys.executable, "-c", COMPARE, ours, theirs, state]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""


def disturb(kind, server, process, delay):
    """Kills the run, or the server for a while, some time after the run's start."""
    time.sleep(delay)
    if kind == "kill" and process.poll() is None:
        process.send_signal(signal.SIGKILL)
    if kind == "away":
        server.kill()
        time.sleep(AWAY)
        server.start()


def attempt(workdir, kind, server, delay):
    """(exit code, last line) of one start of a run."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command(workdir), **pipes)
    other = threading.Thread(target=disturb, args=(kind, server, process, delay))
    other.start()
    output = process.communicate()[0]
    other.join()
    lines = [line for line in output.splitlines() if line.startswith("dinosae_jax: ")]
    return process.returncode, lines[-1] if lines else output.strip().splitlines()[-1:]


def run(scheme, total, seed, folder):
    """Prints a row for each run; returns how many ended badly."""
    draw, server = random.Random(seed), servers.Server(scheme, folder / "bucket")
    between = proxy.Proxy(server.port)
    server.url = between.url
    server.start()
    os.environ.update(server.environment())
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    os.environ |= {"TFDS_DATA_DIR": str(folder / "data"), "DINOSAE_CACHE": str(folder / "copies")}
    root, bad, faults, number = f"{scheme}://{servers.BUCKET}", 0, 0, 0
    began = time.monotonic()
    code, line = attempt(f"{root}/whole", "", server, 0)
    took = time.monotonic() - began
    print(f"undisturbed: {code}, {took:.0f} s {line if code else ''}", flush=True)
    while faults < total:
        number, before, kinds, starts = number + 1, between.faults, [], 0
        workdir, said, wrong = f"{root}/run{number}", [], ""
        code = None
        while code != 0 and starts < 12 and not wrong:
            kind = draw.choice(("", "", "kill", "kill", "away"))
            between.plan = proxy.seeded(draw.random(), RATE)
            code, line = attempt(workdir, kind, server, draw.uniform(0, took))
            between.plan = lambda method, path: ""
            starts += 1
            faults += bool(kind)
            kinds.append(kind or "-")
            if code not in (0, -9):
                said.append(line)
                wrong = "" if str(line).startswith("dinosae_jax: ") else f"no line: {line}"
            wrong = wrong or check(workdir, f"{root}/whole", "done" if code == 0 else "")
        faults += between.faults - before
        wrong = wrong or ("" if code == 0 else "never done")
        bad += bool(wrong)
        row = {"run": number, "requests failed": between.faults - before, "starts": kinds}
        print(json.dumps(row | {"said": said, "wrong": wrong}), f"{faults}/{total}", flush=True)
    server.kill()
    print(f"{faults} faults in {number} runs: {number - bad} ended as the undisturbed one")
    return bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
        sys.exit(run(sys.argv[1], int(sys.argv[2]), seed, pathlib.Path(place)) > 0)
