"""The entry point of the package with its training batches recorded, for tests of real processes.

    python tests/train/recorded_main.py FOLDER STEP [flags of dinosae_jax.main]

Each training batch of this process is written to FOLDER/<place>/<number>.npy, where place is the
process index. Where STEP is not 0 the process sends itself SIGTERM before its STEP-th batch.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np

from dinosae_jax import main
from dinosae_jax.train import sharding


def record(folder, stop_at=0):
    """Makes `sharding.put_batch` write the training batches, the only ones of images alone."""
    real, count = sharding.put_batch, 0

    def recording(batch, mesh):
        nonlocal count
        if set(batch) == {"image"} and mesh.size == jax.device_count():
            place = folder / str(jax.process_index())
            place.mkdir(parents=True, exist_ok=True)
            np.save(place / f"{count}.npy", batch["image"])
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, mesh)

    sharding.put_batch = recording
    return real


if __name__ == "__main__":
    folder, stop_at = sys.argv[1:3]
    record(pathlib.Path(folder), int(stop_at))
    sys.argv = ["dinosae_jax.main", *sys.argv[3:]]
    jax.config.update("jax_default_matmul_precision", "highest")
    main.run()
