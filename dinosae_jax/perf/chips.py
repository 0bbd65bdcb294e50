"""Speeds of accelerators that a prediction needs beside `runtime.hardware`."""

from __future__ import annotations

from typing import NamedTuple

from dinosae_jax.perf import targets
from dinosae_jax.runtime import hardware


class Chip(NamedTuple):
    """Speeds of one jax device.

    Attributes:
      kind: its name in `hardware.KINDS`.
      memory: bytes/s of the main memory.
      link: bytes/s that one link to a neighbour sends.
      clock: cycles per second of the compiler's estimates; 0 where it makes none (GPU).
      wraps: a TPU slice is a torus where every side is a multiple of this.
    """

    kind: str
    memory: float
    link: float
    clock: float = 0.0
    wraps: int = 1

    def peak(self, dtype: str = "bf16") -> float:
        """FLOP/s of matrix products whose factors have a dtype of XLA.

        A float32 product is one pass of bfloat16 on a TPU and TF32 on a GPU, unless the program
        asks for more, which is not seen here.
        """
        tf32 = dtype == "f32" and not self.clock
        return hardware.KINDS[self.kind].peak_tflops * 1e12 / (2 if tf32 else 1)


# Memories and links: Cloud TPU documentation (links: a chip's bidirectional bandwidth over twice
# its ports; a TPU7x device has half of its chip's). Clocks: the peak over the FLOPs per cycle of
# the matrix units (v4, v5p: 8 of 128x128 in two cores; v5e: 4 of 128x128; v6e and half a TPU7x
# chip: 4 of 256x256).
TPUS = {
    "v4": Chip("TPU v4", 1.228e12, 50e9, 1.05e9, 4),
    "v5e": Chip("TPU v5 lite", 0.819e12, 50e9, 1.5e9, 16),
    "v5p": Chip("TPU v5p", 2.765e12, 100e9, 1.75e9, 4),
    "v6e": Chip("TPU v6 lite", 1.638e12, 100e9, 1.75e9, 16),
    "tpu7x": Chip("TPU7x", 3.69e12, 50e9, 2.2e9, 4),
}
# NVLink in one direction, by NVIDIA's data sheets.
NVLINK = {"h200": 450e9, "h100": 450e9, "a100": 300e9}
GPUS = {name: Chip(gpu.kind, gpu.bandwidth, NVLINK[name]) for name, gpu in targets.GPUS.items()}


def find(target: str) -> Chip | None:
    """The chip of a target such as 'v6e:2x4' or 'h200:8'; None for a CPU."""
    return {**TPUS, **GPUS}.get(target.partition(":")[0])


def link_bandwidth(target: str) -> float:
    """Bytes/s that one device of a target can send to the others.

    Of a TPU slice it is that of a corner, the slowest: one link for each side longer than a chip,
    two in a torus. GPUs reach each other through a switch.
    """
    kind, _, shape = target.partition(":")
    if kind in GPUS:
        return GPUS[kind].link
    chip, sides = TPUS[kind], [int(side) for side in shape.split("x")]
    torus = all(side % chip.wraps == 0 for side in sides)
    return max(1, sum(side > 1 for side in sides)) * (2 if torus else 1) * chip.link
