"""Speeds of accelerators that a prediction needs beside `runtime.hardware`."""

from __future__ import annotations

from typing import NamedTuple

from dinosae_jax.perf import targets


class Chip(NamedTuple):
    """Speeds of one jax device.

    Attributes:
      products: FLOP/s of matrix products by the dtype of their factors.
      memory: bytes/s of the main memory.
      link: bytes/s that one link to a neighbour sends.
      clock: cycles per second of the compiler's estimates; 0 where it makes none (GPU).
      wraps: a TPU slice is a torus where every side is a multiple of this.
    """

    products: dict[str, float]
    memory: float
    link: float
    clock: float = 0.0
    wraps: int = 1


# Peaks, memories and links: Cloud TPU documentation (links: a chip's bidirectional bandwidth over
# twice its ports; a TPU7x device has half of its chip's). Clocks: the peak over the FLOPs per cycle
# of the matrix units (v4, v5p: 8 of 128x128 in two cores; v5e: 4 of 128x128; v6e and half a TPU7x
# chip: 4 of 256x256). float32 products are single bfloat16 passes unless the program asks for more.
TPUS = {
    "v4": Chip({"bf16": 275e12}, 1.228e12, 50e9, 1.05e9, 4),
    "v5e": Chip({"bf16": 197e12}, 0.819e12, 50e9, 1.5e9, 16),
    "v5p": Chip({"bf16": 459e12}, 2.765e12, 100e9, 1.75e9, 4),
    "v6e": Chip({"bf16": 918e12}, 1.638e12, 100e9, 1.75e9, 16),
    "tpu7x": Chip({"bf16": 1153.5e12}, 3.69e12, 50e9, 2.2e9, 4),
}
# Data sheets of NVIDIA: dense bfloat16 and TF32; NVLink in one direction. A float32 product is TF32
# unless the program asks for more.
_HOPPER = {"bf16": 989e12, "f16": 989e12, "f32": 494.5e12}
_AMPERE = {"bf16": 312e12, "f16": 312e12, "f32": 156e12}
GPUS = {
    "h200": Chip(_HOPPER, targets.GPUS["h200"].bandwidth, 450e9),
    "h100": Chip(_HOPPER, targets.GPUS["h100"].bandwidth, 450e9),
    "a100": Chip(_AMPERE, targets.GPUS["a100"].bandwidth, 300e9),
}


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
