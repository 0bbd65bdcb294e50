"""The entry point of the package with its training batches recorded, for tests of real processes.

    python tests/train/recorded_main.py FOLDER STEP [flags of dinosae_jax.main]

What of each training batch lies on this process's devices is written to
FOLDER/<process>/<number>.npz with the rows of the global batch that it is. Where STEP is not 0 the
process sends itself SIGTERM before its STEP-th batch. Several processes hold alternate devices of
the mesh, as the hosts of a TPU pod do.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np

from dinosae_jax import main
from dinosae_jax.runtime import sharding


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


if __name__ == "__main__":
    folder, stop_at = sys.argv[1:3]
    record(pathlib.Path(folder), int(stop_at))
    alternate()
    sys.argv = ["dinosae_jax.main", *sys.argv[3:]]
    jax.config.update("jax_default_matmul_precision", "highest")
    main.run()
