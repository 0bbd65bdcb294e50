"""Kill -9 at random moments of a chain of five stages, until it is done, again and again.

    python -m tests.train.kills 100 [FOLDER [gs|s3]]

Each chain is started, killed and started again until it ends, in new processes that share compiled
programs. It must then be bitwise that of a chain that nobody disturbed: states and metrics lines.
The undisturbed chain is on the disk, in FOLDER, where a later call finds it; the killed ones are
there too, or in a bucket of a server on this machine.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import jax
import numpy as np

from configs import quickstart
from dinosae_jax.jobs import train
from dinosae_jax.runtime import files, snapshots
from dinosae_jax.weights import checkpoint
from tests.buckets import servers

FIELDS = ("step", "params", "opt", "ema", "extra", "metrics", "key", "skipped")
SHARE = 0.4  # a chain is killed after at most this share of the time of an undisturbed one
SMALL = {
    "steps": 5,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint.every": 2,
    "eval.every": 2,
    "eval.images": 8,
    "eval.batch_size": 8,
    "data.threads": 0,
}
SMALL_FLOW = {
    "eval.samples": 8,
    "sampling.steps": 2,
    "model.dit.hidden_size": 32,
    "model.dit.depth": 1,
    "model.dit.num_heads": 2,
}


def chain(data_dir):
    config = quickstart.get_config("tiny")
    for name in config.chain:
        flow = SMALL_FLOW if name == "flow" else {}
        values = {"data.data_dir": str(data_dir), **SMALL, **flow}
        config.stages[name].update_from_flattened_dict(values)
    return config


def start(root, workdir):
    """Starts the chain in a new process; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    with (root / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        train.run(chain(root / "data"), files.path(workdir))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(root, workdir, seconds=None):
    """Runs the chain and kills it after some seconds; whether it came to its end."""
    pid, began = start(root, workdir), time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, (root / "output").read_text()[-3000:]
            return True
        if seconds is not None and time.monotonic() - began > seconds:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.01)


def state_of(folder):
    """The newest state in a workdir, here or in a bucket."""
    return checkpoint.load_fields(snapshots.local(checkpoint.newest(folder)), FIELDS)[0]


def differences(ours, theirs):
    """What of two finished chains is not bitwise the same."""
    found, ours, theirs = [], files.path(ours), files.path(theirs)
    for name in quickstart.STAGES:
        metrics = [(folder / name / "metrics.jsonl").read_bytes() for folder in (ours, theirs)]
        if metrics[0] != metrics[1]:
            found.append(f"{name}: metrics.jsonl")
        states = [state_of(folder / name) for folder in (ours, theirs)]
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, *states))):
            found.append(f"{name}: state")
    return found


def compare(root, workdir):
    """Runs `differences` in a process of its own: this one must stay without devices."""
    pid = os.fork()
    if not pid:
        found = differences(workdir, root / "whole")
        print("\n".join(found), flush=True)
        os._exit(len(found) > 0)
    return os.waitpid(pid, 0)[1] == 0


def undisturbed(root):
    """Makes the undisturbed chain where it is not there yet; returns the seconds that it took."""
    noted = root / "seconds"
    if not noted.exists():
        finish(root, root / "compiled")  # so that the time below has no compilation in it
        began = time.monotonic()
        finish(root, root / "whole")
        noted.write_text(str(time.monotonic() - began))
    return float(noted.read_text())


def run(kills, root, place, seed=0):
    """Returns (kills, chains that ended, chains that ended otherwise than the undisturbed)."""
    draw, whole = random.Random(seed), undisturbed(root)
    done = chains = wrong = 0
    while done < kills:
        workdir = f"{place}/killed{chains}"
        while not finish(root, workdir, draw.uniform(0, SHARE * whole) if done < kills else None):
            done += 1
            print(f"{done} kills, {chains} chains, {whole:.1f} s each undisturbed", flush=True)
        chains += 1
        wrong += not compare(root, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
    return done, chains, wrong


@contextlib.contextmanager
def place_of(scheme, root):
    """Where the chains that are killed lie: in a folder, or in a bucket that is served here."""
    if not scheme:
        yield root
        return
    with servers.serving(scheme) as server:
        os.environ.update(server.environment() | {"DINOSAE_CACHE": str(root / "copies")})
        yield f"{scheme}://{servers.BUCKET}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else temporary)
        root.mkdir(parents=True, exist_ok=True)
        for name, value in {
            "jax_compilation_cache_dir": str(root / "programs"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }.items():
            jax.config.update(name, value)
        with place_of("".join(sys.argv[3:4]), root) as place:
            kills, chains, wrong = run(int(sys.argv[1]), root, place)
    print(f"{kills} kills in {chains} chains: {chains - wrong} bitwise as the undisturbed one")
    sys.exit(wrong > 0)
