"""Target devices for ahead-of-time compilation, present or not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from dinosae_jax import names, spelling

# Generation -> configuration of its chips, a slice of it; a v4 or v5p chip is one device
# ("megacore").
GENERATIONS = {
    "v4": ("megacore", "2x2x4"),
    "v5e": ("default", "4x4"),
    "v5p": ("megacore", "4x4x4"),
    "v6e": ("default", "2x4"),
    "tpu7x": ("default", "2x2x1"),
}
EXAMPLES = ("cpu:8", "h200:8", "v4:2x2x4", "v5e:4x4", "v5p:4x4x4", "v6e:2x4", "v6e:16x16")
HOST_GPUS = 8
# Without a GPU to try tilings on, not every matrix product gets a Triton tiling.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# xla.ExecutionOptions.EffortLevel; jax 0.10 and 0.12 both take the number, 0.12 alone the name.
EFFORT_LEVELS: dict[names.Effort, int] = {"default": 0, "O0": 9, "O1": 19, "O2": 29, "O3": 39}


class Gpu(NamedTuple):
    """What XLA's compiler needs to know about a GPU, as the manufacturer states it.

    Attributes:
      kind: jax's device_kind.
      capability: compute capability.
      multiprocessors: streaming multiprocessors of one GPU.
      lanes: float32 lanes per multiprocessor.
      clock_ghz: clock of the multiprocessors.
      shared_memory: KiB per multiprocessor; a block can have 1 KiB less.
      memory: bytes.
      bandwidth: bytes/s of the memory.
      cache: MiB of L2.
    """

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    clock_ghz: float
    shared_memory: int
    memory: int
    bandwidth: float
    cache: int


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 228, 151_397_597_184, 4.8e12, 50),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 228, 85_029_158_912, 3.35e12, 50),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 164, 85_097_971_712, 2.039e12, 40),
}
# Without these libtpu asks a metadata server for its identity, waits for another process's lock, or
# overflows the 64 KiB stacks of its threads, which ends the process.
LIBTPU_ENVIRONMENT = {
    "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=16777216",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices_of(target: str) -> list[Any]:
    """The devices of a target such as 'cpu:8' or 'v5e:4x4'.

    Args:
      target: 'cpu:N' for N devices of this machine's processor, a GPU and their number, or a TPU
        generation and the shape of the slice in chips.

    Raises:
      ValueError: for an unknown target, or where its compiler is not installed.
    """
    kind, _, shape = target.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return _cpu_devices(int(shape))
    if kind in GPUS and shape.isdigit() and int(shape) > 0:
        return _gpu_devices(target, GPUS[kind], int(shape))
    if kind not in GENERATIONS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"target must be 'cpu:N', {' or '.join(repr(gpu + ':N') for gpu in GPUS)}, or a TPU "
            f"generation and its shape; got {target!r}"
            f"{spelling.nearest(target, EXAMPLES)}"
        )
    return _tpu_devices(target, *GENERATIONS[kind])


def compiler_options(target: str, effort: names.Effort) -> dict[str, Any]:
    """What XLA is told beyond its defaults for a target, at an effort of `names.Effort`."""
    options = GPU_OPTIONS if target.partition(":")[0] in GPUS else {}
    return {**options, "optimization_level": EFFORT_LEVELS[effort]}


def _cpu_devices(count: int) -> list[Any]:
    # A backend that is already running keeps its devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"target=cpu:{count} needs as many CPU devices; got {len(devices)} in this process; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _tpu_devices(target: str, chip_config: str, example: str) -> list[Any]:
    kind, _, shape = target.partition(":")
    if shape.count("x") != example.count("x"):  # libtpu would accept it
        raise ValueError(
            f"a slice of {kind} has {example.count('x') + 1} sides; got target={target}; "
            f"{kind}:{example} is one that exists"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"target={target} needs the TPU compiler; got an environment without libtpu; "
            "pip install 'dinosae-jax[plan]'"
        )
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": chip_config}
    if set(shape.split("x")) == {"1"}:  # a host of one chip
        options["chips_per_host_bounds"] = [1, 1, 1]
    return _describe(target, target, "tpu", **options)


def _gpu_devices(target: str, gpu: Gpu, count: int) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError(
            f"target={target} needs the GPU compiler (no GPU); got an environment without it; "
            "pip install 'dinosae-jax[cuda]'"
        )
    if count > HOST_GPUS and count % HOST_GPUS:
        raise ValueError(
            f"a target is one host, or hosts of {HOST_GPUS} GPUs; got {target}; take a multiple of "
            f"{HOST_GPUS}"
        )
    hosts = -(-count // HOST_GPUS)
    shape = f"1x{hosts}x{count // hosts}"  # slices, hosts, GPUs of a host
    return _describe(target, "", "cuda", target_config=gpu_text(gpu), topology=shape)


def gpu_text(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto in text form; limits that all these GPUs share are constants."""
    major, minor = gpu.capability
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory << 10}
      shared_memory_per_block_optin: {(gpu.shared_memory - 1) << 10}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {gpu.multiprocessors} fpus_per_core: {gpu.lanes}
      clock_rate_ghz: {gpu.clock_ghz} l2_cache_size: {gpu.cache << 20}
      device_memory_size: {gpu.memory} memory_bandwidth: {int(gpu.bandwidth)}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{gpu.kind}"
    """


def _describe(target: str, name: str, platform: str, **options: Any) -> list[Any]:
    """Devices that need not be present, from an installed compiler."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")  # the compiler is used, never a device
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(name, platform, **options)
    except Exception as error:  # jaxlib raises its own type, for shapes that do not exist
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"target must exist for the {platform} compiler; got {target!r} ({reason}); choose one "
            f"such as {', '.join(EXAMPLES[1:])}"
        ) from error
    return list(description.devices)
