"""The start of every job: for one process, a start by hand, SLURM, TPU pods and Kubernetes."""

from __future__ import annotations

import os
import platform
import re
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from dinosae_jax.runtime import files

# Environment variables by which a person or a cluster announces several processes.
MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_ID")
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # names joined by commas


def start() -> None:
    """Joins the other processes, where there are any, before any device is used.

    Raises:
      ValueError: for a start by hand that is incomplete or wrong, a cluster that JAX does not know,
        or processes that do not find each other.
    """
    spare_threads()
    # Its C++ handler would swallow SIGTERM, and `stopping` decides for all jobs; see there.
    jax.config.update("jax_enable_preemption_service", False)
    said = [f"{name}={os.environ[name]}" for name in (*COUNTS, *HOSTS) if _several(name)]
    try:
        if any(os.environ.get(name) for name in MANUAL):
            _join_by_hand()
        elif said or _on_tpu_vm():
            _join_cluster(said)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "all processes must find each other; got "
            f"{str(error).splitlines()[0]}; start all of them within 300 s, and let them reach the "
            "port of the first"
        ) from error
    if jax.distributed.is_initialized():
        # Now, while all are ready: gloo's first collective times out after 30 s, and compilations
        # would delay it.
        multihost_utils.sync_global_devices("start")


def require_devices() -> None:
    """Starts JAX's platform.

    Raises:
      ValueError: where this machine or this jax has no such platform as JAX_PLATFORMS names.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where there is no such plugin
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or ["no such platform is installed"])[0]
        raise ValueError(
            "JAX_PLATFORMS must name a platform of this machine and of this jax; got "
            f"{wanted or ''!r} ({reason}); unset it to use what is available, or install jax for "
            "it (pip install 'dinosae-jax[cuda]' or 'dinosae-jax[tpu]')"
        ) from error


def keep_programs(compile_cache: str) -> None:
    """Names the folder of compiled programs, which later processes read; starts JAX's platform.

    Args:
      compile_cache: the folder, empty for none. 'auto' is what JAX_COMPILATION_CACHE_DIR says, else
        a folder for each platform in `files.caches()`; programs for a CPU may need its very
        instructions, so each host has its own.
    """
    if compile_cache == "auto":
        if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            return
        backend = jax.default_backend()
        name = f"cpu-{platform.node()}" if backend == "cpu" else backend
        compile_cache = str(files.caches() / name)
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(files.path(compile_cache)))


def spare_threads() -> None:
    """Gives forced CPU devices enough threads, before any device is used.

    XLA:CPU lets collectives wait inside its pool, which has as many threads as the machine has
    cores or devices; with convolutions in the same pool it can run out of threads and deadlock. The
    environment variable `NPROC` sets another number of threads.
    """
    forced = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced and int(forced[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(forced[1])))


def abandon(code: int) -> NoReturn:
    """Ends this process after an error, without waiting for the others.

    At a normal exit JAX waits for all processes (300 s), while they may wait for this process in a
    collective; they end themselves as soon as it is gone.

    Args:
      code: the exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join_by_hand() -> None:
    address, count, index = (os.environ.get(name, "") for name in MANUAL)
    missing = sorted(name for name in MANUAL if not os.environ.get(name))
    if missing:
        raise ValueError(
            f"a start by hand needs all of {', '.join(MANUAL)}; got no {' and no '.join(missing)}; "
            "set them for each process"
        )
    numbers = count.isdecimal() and index.isdecimal() and int(index) < int(count)
    if not numbers or not re.fullmatch(r".+:\d+", address):
        raise ValueError(
            f"a start by hand needs {MANUAL[0]}=HOST:PORT of the first process, the number of "
            f"processes, and an index from 0 below it; got {address}, {count} and {index}; change "
            f"{', '.join(MANUAL)}"
        )
    # No cluster detection: under SLURM it would give each process one GPU.
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=int(count),
        process_id=int(index),
        cluster_detection_method="deactivate",
    )


def _join_cluster(said: list[str]) -> None:
    """Lets JAX find the other processes; `said` are the variables that announce them, if any."""
    try:
        jax.distributed.initialize()
    except (ValueError, OSError) as error:
        if not said and jax.process_count() == 1:
            return  # chips without the metadata of a slice
        raise ValueError(
            f"{' '.join(said) or 'the TPU'} indicates several processes, but JAX could not connect "
            f"them; got {error}; start each with srun or mpirun, set {', '.join(MANUAL)} for each, "
            "or unset that variable to run alone"
        ) from error


def _on_tpu_vm() -> bool:
    """Whether JAX uses the chips of a Cloud TPU VM, whose metadata server knows its hosts."""
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    return "tpu" in platforms and "TPU_SKIP_MDS_QUERY" not in os.environ


def _several(name: str) -> bool:
    """Whether a cluster's variable indicates more than one process."""
    value = os.environ.get(name, "")
    return "," in value or (value.isdecimal() and int(value) > 1)
