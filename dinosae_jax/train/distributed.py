"""The start of every job: one call that works alone, on SLURM, on TPU pods and on Kubernetes."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

# Variables by which a cluster, or a person, says that there are several processes.
MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_ID")
CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX")


def start(compile_cache: str = "") -> None:
    """Joins the other processes, where there are any, before any device is used.

    Args:
      compile_cache: folder for compiled programs, empty for none.

    Raises:
      ValueError: where only some of the variables for a start by hand are set.
    """
    spare_threads()
    if compile_cache:
        folder = str(pathlib.Path(compile_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)
    # Its C++ handler would swallow SIGTERM, and `stopping` decides for all jobs; see there.
    jax.config.update("jax_enable_preemption_service", False)
    given = [name for name in MANUAL if os.environ.get(name)]
    if given and len(given) < len(MANUAL):
        missing = sorted(set(MANUAL) - set(given))
        raise ValueError(
            f"a start by hand needs all of {', '.join(MANUAL)}; missing {', '.join(missing)}"
        )
    if given:
        jax.distributed.initialize(
            coordinator_address=os.environ[MANUAL[0]],
            num_processes=int(os.environ[MANUAL[1]]),
            process_id=int(os.environ[MANUAL[2]]),
        )
    elif any(_several(os.environ.get(name, "")) for name in CLUSTERS):
        jax.distributed.initialize()
    if jax.distributed.is_initialized():
        # While all are here: gloo gives a first meeting 30 s, and compilations take turns.
        multihost_utils.sync_global_devices("start")


def spare_threads() -> None:
    """Gives forced CPU devices enough threads, before any device is used.

    XLA:CPU lets collectives wait inside its pool, which has as many threads as the machine has
    cores or devices; with convolutions in the same pool it can run dry, and the program stops.
    `NPROC` is the variable by which the runtime is told another number.
    """
    forced = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced and int(forced[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(forced[1])))


def abandon(code: int) -> NoReturn:
    """Ends this one of several processes after an error, without meeting the others.

    At a normal exit JAX waits for all processes (300 s); they may be waiting for this one in a
    collective, and end themselves as soon as it is gone.

    Args:
      code: of the exit.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _several(value: str) -> bool:
    """Whether a cluster's variable speaks of more than one process."""
    return "," in value or (value.isdigit() and int(value) > 1)
