"""Faults of storage and of what reads it, on checkpoints of a tiny state: each must end well.

    python -m tests.weights.faults environment 300
    python -m tests.weights.faults storage 300

A fault of the environment is an error that reading raises while the bytes are good: a run must say
so and leave every checkpoint as it is. A fault of storage changes the bytes of the newest
checkpoint: a run must end in the newest or in the one before it, whichever is whole, bitwise.
"""

import builtins
import contextlib
import errno
import io
import os
import pathlib
import random
import shutil
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dinosae_jax.runtime import sharding
from dinosae_jax.train import optim
from dinosae_jax.train import state as state_lib
from dinosae_jax.weights import checkpoint, integrity

STEPS = (1, 2)
ERRNOS = ("EACCES", "ESTALE", "EIO", "EMFILE", "ENFILE", "ENOENT", "ETIMEDOUT", "EPERM", "ENOTCONN")
TEXTS = (
    "PERMISSION_DENIED: Error opening file [OS error 13: EACCES Permission denied]",
    "UNAVAILABLE: Stale file handle [OS error 116: ESTALE]",
    "DATA_LOSS: short read; Input/output error [OS error 5: EIO]",
    "RESOURCE_EXHAUSTED: Too many open files [OS error 24: EMFILE]",
    "NOT_FOUND: Error opening manifest [OS error 2: ENOENT]",
    "Error reading manifest: cannot say why",
)


def make_state(step, width=64):
    params = {"decoder": {"kernel": jnp.arange(width * 8.0).reshape(width, 8) + step}}
    state = state_lib.create(
        params, {"decoder": {}}, {"generator": optim.init(params)}, ("loss",), 0, ("decoder",)
    )
    return state.replace(step=jnp.int32(step))


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        sharding.shardings(jax.eval_shape(lambda s: s, state), mesh),
    )


def save_steps(workdir, steps):
    with checkpoint.open_manager(workdir, keep=3) as manager:
        for step in steps:
            checkpoint.save(manager, make_state(step), {"note": step})
            checkpoint.wait(manager)


def restore(workdir):
    """The state of the newest whole checkpoint, as a new process would find it."""
    target = abstract(make_state(0), sharding.make_mesh(1, jax.devices()[:1]))
    with checkpoint.open_manager(workdir, keep=3) as manager:
        found = checkpoint.restore_newest(manager, target)
    return found and found[0]


def is_state(found, step):
    same = jax.tree.map(np.array_equal, found, make_state(step))
    return all(jax.tree.leaves(same))


def contents(folder):
    """File -> bytes of everything under a folder."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def system_error(draw):
    number = getattr(errno, draw.choice(ERRNOS))
    return OSError(number, os.strerror(number))


def wrapped(draw):
    """An error as Orbax and TensorStore wrap it, or one of a lost peer or of a full device."""
    kind = draw.randrange(4)
    if kind == 0:
        return system_error(draw)
    if kind == 1:
        error = ValueError(draw.choice(TEXTS))
        error.__cause__ = system_error(draw) if draw.random() < 0.5 else None
        return error
    if kind == 2:
        return jax.errors.JaxRuntimeError(draw.choice(("ABORTED: peer lost", "INTERNAL: gloo")))
    return draw.choice((MemoryError(), KeyError("manifest"), TimeoutError("barrier")))


@contextlib.contextmanager
def failing_opens(draw):
    """From some time on, opening or listing fails for a while, or for good."""
    error, left = system_error(draw), draw.randrange(25)
    last = draw.choice((left + 1, left + 3, 10**6))
    count = 0

    def wrap(real):
        def opening(path, *arguments, **options):
            nonlocal count
            if checkpoint.FOLDER in str(path):
                count += 1
                if left <= count < last:
                    raise error
            return real(path, *arguments, **options)

        return opening

    with contextlib.ExitStack() as stack:
        for module, name in ((builtins, "open"), (io, "open"), (os, "scandir"), (os, "listdir")):
            stack.enter_context(mock.patch.object(module, name, wrap(getattr(module, name))))
        yield


@contextlib.contextmanager
def failing_call(draw):
    """One of the calls that a restore consists of fails."""
    place = draw.choice(
        (
            (ocp.StandardCheckpointHandler, "restore"),
            (checkpoint, "read_record"),
            (integrity, "checksums"),
            (pathlib.Path, "rename"),
        )
    )
    error = wrapped(draw)
    with mock.patch.object(*place, mock.Mock(side_effect=error)):
        yield


def environment_fault(workdir, draw):
    """Runs one restore under a fault; returns what is wrong with its end, or ''."""
    before = contents(workdir / checkpoint.FOLDER)
    with draw.choice((failing_opens, failing_call))(draw):
        try:
            found = restore(workdir)
            ended = "" if found is not None and is_state(found, STEPS[-1]) else "another state"
        except Exception:
            ended = ""
    if contents(workdir / checkpoint.FOLDER) != before:
        return "the checkpoints are not what they were"
    found = restore(workdir)
    return ended or ("" if is_state(found, STEPS[-1]) else "the next start finds another state")


def storage_fault(workdir, draw):
    """Changes the newest checkpoint and restores; returns what is wrong with the end, or ''."""
    newest = workdir / checkpoint.FOLDER / str(STEPS[-1])
    paths = sorted(path for path in newest.rglob("*") if path.is_file())
    path, other = draw.sample(paths, 2)
    kind = draw.choice(("flip", "truncate", "delete", "swap"))
    data = bytearray(path.read_bytes())
    if kind == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "truncate" and data:
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        path.unlink()
    said = f"{kind} of {path.relative_to(newest)}"
    try:
        found = restore(workdir)
    except Exception as error:
        return f"{said}: {type(error).__name__}: {error}"
    if found is None:
        return f"{said}: no checkpoint"
    if is_state(found, STEPS[-1]):
        return ""
    if not is_state(found, STEPS[0]):
        return f"{said}: another state"
    aside = newest.with_name(f"{newest.name}.damaged")
    return "" if aside.exists() else f"{said}: the damaged checkpoint is gone"


FAULTS = {"environment": environment_fault, "storage": storage_fault}


def run(kind, count, seed=0):
    """Runs `count` cases of a kind; returns the failures, each in a line."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "whole"
        save_steps(whole, STEPS)
        for number in range(count):
            workdir = pathlib.Path(folder) / str(number)
            shutil.copytree(whole, workdir)
            with contextlib.redirect_stdout(io.StringIO()):
                wrong = FAULTS[kind](workdir, random.Random(f"{kind} {seed} {number}"))
            if wrong:
                failures.append(f"case {number}: {wrong}")
            shutil.rmtree(workdir)
    return failures


if __name__ == "__main__":
    found = run(sys.argv[1], int(sys.argv[2]))
    print("\n".join(found))
    print(f"{sys.argv[1]}: {int(sys.argv[2]) - len(found)} of {sys.argv[2]} cases ended well")
