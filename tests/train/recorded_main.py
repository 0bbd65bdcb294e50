"""The entry point of the package with its training batches recorded, for tests of real processes.

    python tests/train/recorded_main.py FOLDER STEP [flags of dinosae_jax.main]

What of each training batch lies on this process's devices is written to
FOLDER/<process>/<number>.npz with the rows of the global batch that it is. Where STEP is not 0 the
process sends itself SIGTERM before its STEP-th batch. Several processes hold alternate devices of
the mesh, as the hosts of a TPU pod do. TEST_LIE in the environment names what this process is told
wrong (`LIES`).
"""

import functools
import os
import pathlib
import signal
import sys
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from dinosae_jax import main
from dinosae_jax.data import images
from dinosae_jax.runtime import sharding
from dinosae_jax.train import autoencoder_evaluation, loop, stages
from dinosae_jax.weights import checkpoint


def record(folder, stop_at=0):
    """Makes `sharding.put_batch` write the training batches, the only ones of images alone."""
    real, count = sharding.put_batch, 0

    def recording(batch, mesh):
        nonlocal count
        placed = real(batch, mesh)
        if set(batch) == {"image"} and mesh.size == jax.device_count():
            place = folder / str(jax.process_index())
            place.mkdir(parents=True, exist_ok=True)
            shards = placed["image"].addressable_shards
            rows = [np.arange(len(placed["image"]))[shard.index[0]] for shard in shards]
            image = np.concatenate([np.asarray(shard.data) for shard in shards])
            np.savez(place / f"{count}.npz", rows=np.concatenate(rows), image=image)
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return placed

    sharding.put_batch = recording
    return real


def alternate():
    """Makes `sharding.make_mesh` deal the devices of all processes out in turns."""
    real = sharding.make_mesh

    def dealt(fsdp=1, devices=None):
        if devices is None:
            local = jax.local_device_count()
            devices = [jax.devices()[i::local] for i in range(local)]
            devices = [device for turn in devices for device in turn]
        return real(fsdp, devices)

    sharding.make_mesh = dealt


def stale_listing():
    """The newest checkpoint is not in the folder yet, seen from here."""
    real = ocp.CheckpointManager.all_steps
    patch = mock.patch.object(ocp.CheckpointManager, "all_steps", lambda self: real(self)[:-1])
    patch.start()


def unreadable():
    """The server of the checkpoints refuses this host."""
    denied = PermissionError(13, "Permission denied")
    mock.patch.object(checkpoint, "read_record", side_effect=denied).start()


def other_data():
    """The folder of images holds others here."""
    real = images.open_images

    def opened(*arguments):
        source = real(*arguments)
        source.fingerprint = "other"
        return source

    mock.patch.object(images, "open_images", opened).start()


def slow():
    """This host is 35 s late at the restore: gloo alone would wait 30."""
    real = checkpoint.restore_newest

    def late(*arguments):
        time.sleep(35)
        return real(*arguments)

    mock.patch.object(checkpoint, "restore_newest", late).start()


LIES = {function.__name__: function for function in (stale_listing, unreadable, other_data, slow)}
# Phase -> the function at whose call this process is killed.
PHASES = {
    "start": (stages, "agree_on_program"),
    "restore": (checkpoint, "restore_newest"),
    "step": (loop, "run"),
    "save": (checkpoint, "save"),
    "evaluate": (autoencoder_evaluation.Evaluation, "metrics"),
}


def die_in(phase):
    """This process is killed (-9) when it comes to a phase."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(*PHASES[phase], die).start()


LIES |= {f"dies_in_{phase}": functools.partial(die_in, phase) for phase in PHASES}

if __name__ == "__main__":
    if lie := os.environ.get("TEST_LIE"):
        LIES[lie]()
    folder, stop_at = sys.argv[1:3]
    record(pathlib.Path(folder), int(stop_at))
    alternate()
    sys.argv = ["dinosae_jax.main", *sys.argv[3:]]
    jax.config.update("jax_default_matmul_precision", "highest")
    main.run()
