"""Peak speed and memory of accelerators, and the utilisation of a run."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import jax


class Hardware(NamedTuple):
    """Speed and memory of one jax device.

    Attributes:
      peak_tflops: dense bfloat16 TFLOP/s, as the manufacturer states.
      memory_gib: GiB of device memory.
    """

    peak_tflops: float
    memory_gib: float


# jax's device_kind -> values of the manufacturers' data sheets (Cloud TPU documentation, NVIDIA). A
# TPU7x chip is two devices; a v4 or v5p chip is one (megacore).
KINDS = {
    "TPU v4": Hardware(275.0, 32.0),
    "TPU v5 lite": Hardware(197.0, 16.0),
    "TPU v5": Hardware(459.0, 95.0),
    "TPU v5p": Hardware(459.0, 95.0),
    "TPU v6 lite": Hardware(918.0, 32.0),
    "TPU7x": Hardware(1153.5, 96.0),
    "NVIDIA A100-SXM4-40GB": Hardware(312.0, 40.0),
    "NVIDIA A100-SXM4-80GB": Hardware(312.0, 80.0),
    "NVIDIA H100 80GB HBM3": Hardware(989.0, 80.0),
    "NVIDIA H200": Hardware(989.0, 141.0),
}


def find(device: jax.Device) -> Hardware | None:
    """The entry of a device in `KINDS`, or None (a CPU)."""
    return KINDS.get(device.device_kind)


def utilisation(
    flops_per_image: int, images_per_second: float, devices: list[jax.Device]
) -> dict[str, float]:
    """Speed in model FLOPs.

    Args:
      flops_per_image: model FLOPs of a training step per image, `step_flops.train_flops`.
      images_per_second: speed of all devices together.
      devices: the devices that share the work, all of one kind.

    Returns:
      'tflops_per_device', and 'mfu' (fraction of the peak) where the peak is known.
    """
    tflops = flops_per_image * images_per_second / len(devices) / 1e12
    hardware = find(devices[0])
    return {"tflops_per_device": tflops} | (
        {"mfu": tflops / hardware.peak_tflops} if hardware else {}
    )


def peak_memory() -> int:
    """Peak memory in bytes: of the first device, or of the process where the device counts none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get("peak_bytes_in_use", process))
