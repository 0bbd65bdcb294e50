"""Predicts the seconds of a compiled step from its text, instruction by instruction; nothing runs.

TPU: the compiler writes its own estimate in cycles on what it schedules; a hand-written kernel has
none and counts by its own FLOPs and bytes. GPU: each instruction takes the longer of its FLOPs and
its bytes, at `EFFICIENCY` of the peaks. Collectives count by the bytes that a device sends over the
bandwidth of its links. Loop bodies count once per iteration, of a conditional the longest branch.

Beside it stands a bound: the same instructions at the peak and at full bandwidth. XLA:TPU's
estimate of what it computes element by element can be several times that, by its tiles.

Left out: overlap (of collectives, and of copies between memories, with computing), launches, waits
for the host, links between slices or GPU hosts, the latency of a collective.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dinosae_jax.perf import chips, collectives, hlo, roofline

PRODUCTS, ATTENTION, ELEMENTWISE = "weight products", "attention", "norms and elementwise"
COPIES, COLLECTIVES, KERNELS = "copies and layout", "collectives", "kernels"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, COLLECTIVES, KERNELS)
# Shares of the peaks where no compiler says more. GPU products: 790 of 989 TFLOP/s, measured for
# bfloat16 8192x8192x8192 on an H200. Fused attention: FlashAttention-3 at head width 64
# (arXiv:2407.08608, figures 5 and 6). Memory: what the TPU compiler's own estimate of a large copy
# reaches on v5e and v6e, and a large copy on a GPU.
EFFICIENCY = {"products": 0.8, "attention": 0.4, "memory": 0.8}
CONTROL = ("while", "conditional", "call", "async-start")
KERNEL_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")
MOVES = {"copy", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "concatenate", "pad"}
MOVES |= {"dynamic-update-slice", "copy-start", "parameter", "constant", "tuple", "broadcast"}
MOVES |= {"get-tuple-element", "iota", "gather", "reverse", "bitcast-convert"}
# Paths of attention without its projections: a scope of that name; `jax.nn.dot_product_attention`
# as it is without a kernel, which maps its einsums and its softmax over groups of heads.
_ATTENTION = re.compile(r"\battention/|\bvmap\((?:\w{4},\w{4}->\w{4})?\)|softmax")
# A call of cuBLAS with batch dimensions, which has lost its path: both factors are activations.
_BATCHED = r'("lhs_batch_dimensions":\["\d)'


class Cost(NamedTuple):
    """What one instruction of a program takes in one step.

    Attributes:
      kind: one of `KINDS`.
      instruction: its line.
      computation: the computation that holds it.
      runs: executions in one step.
      seconds: of all executions together, as those below.
      bound: seconds at least, by FLOPs at the peak and bytes at the full bandwidth.
      flops: of its matrix products.
      bytes: of the main memory, of a collective of the links.
    """

    kind: str
    instruction: hlo.Instruction
    computation: str
    runs: int
    seconds: float
    bound: float
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The costs of one step, and what they add up to."""

    costs: tuple[Cost, ...]

    @property
    def by_kind(self) -> dict[str, float]:
        """Seconds of each of `KINDS`."""
        return {kind: sum(c.seconds for c in self.costs if c.kind == kind) for kind in KINDS}

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.by_kind.values())

    @property
    def bound(self) -> float:
        """Seconds that these instructions take at least."""
        return sum(cost.bound for cost in self.costs)

    @property
    def seconds_without_kernels(self) -> float:
        """Seconds without the hand-written kernels, of which only estimates by hand are known."""
        return self.seconds - self.by_kind[KERNELS]

    @property
    def silent_kernels(self) -> int:
        """Executions of hand-written kernels that state no FLOPs: counted by their arrays alone."""
        kernels = [cost for cost in self.costs if cost.kind == KERNELS]
        return sum(c.runs for c in kernels if not roofline.kernel_estimate(c.instruction))

    def mfu(self, flops: float, peak: float) -> float:
        """Model FLOPs of the step on one device over what the peak (FLOP/s) would do meanwhile."""
        return flops / (self.seconds * peak)

    def costliest(self, count: int) -> list[Cost]:
        """The instructions that take longest."""
        return sorted(self.costs, key=lambda cost: -cost.seconds)[:count]


def predict(module: hlo.Module, target: str) -> Prediction | None:
    """The costs of a compiled step on a target; None for a CPU.

    Args:
      module: the program of one device, `hlo.parse(compiled.as_text())`.
      target: such as 'v6e:2x4' or 'h200:8'.
    """
    chip = chips.find(target)
    if chip is None:
        return None
    reached = module.executions(lambda found: found.called if found.opcode in CONTROL else ())
    once: dict[str, list[Cost]] = {}
    totals: dict[str, float] = {}
    for name in module.computations:  # a computation comes after those that it calls
        if name in reached:
            once[name] = list(_costs(name, module, target, chip))
            totals[name] = sum(cost.seconds for cost in once[name])
            for found in module.computations[name].values():
                totals[name] += module.trips(found) * sum(totals[c] for c in _run(found, totals))
    runs = module.executions(lambda found: _run(found, totals))
    return Prediction(
        tuple(_repeat(cost, times) for name, times in runs.items() for cost in once.get(name, ()))
    )


def describe_loops(found: Prediction) -> list[str]:
    """The loops as lines: iterations, milliseconds of all and of one, where they stand."""
    bodies: dict[str, list[Cost]] = {}
    for cost in found.costs:
        if cost.runs > 1:
            bodies.setdefault(cost.computation, []).append(cost)
    lines = []
    for costs in bodies.values():
        runs, seconds = costs[0].runs, sum(cost.seconds for cost in costs)
        source = max(costs, key=lambda cost: cost.seconds).instruction.op_name
        lines.append(
            f"{1e3 * seconds:8.2f} ms in {runs} turns of {1e3 * seconds / runs:.3f} ms  "
            f"{source.rpartition('/body')[0]}"
        )
    return lines


def describe(costs: Iterable[Cost]) -> list[str]:
    """The costs as lines: time, bound, executions, FLOPs, bytes, kind, name, type, source."""
    return [
        f"{1e3 * cost.seconds:8.2f} ms (at least {1e3 * cost.bound:7.2f}) {cost.runs:5} x "
        f"{cost.flops / 1e12:8.3f} TFLOP {cost.bytes / 1e9:8.2f} GB  {cost.kind:<21} "
        f"{cost.instruction.name}: {_shape(cost.instruction)}  {cost.instruction.op_name}"
        for cost in costs
    ]


def _run(found: hlo.Instruction, totals: dict[str, float]) -> list[str]:
    """What a loop, a call or a conditional runs: of branches the longest."""
    if found.opcode not in CONTROL:
        return []
    straight = [name for name in found.called if name not in found.branches and name in totals]
    branches = [name for name in found.branches if name in totals]
    return straight + ([max(branches, key=lambda name: totals[name])] if branches else [])


def _costs(name: str, module: hlo.Module, target: str, chip: chips.Chip) -> Iterator[Cost]:
    """Costs of one execution of a computation without what it calls."""
    for found in module.computations[name].values():
        sent = sum(c.link_bytes for c in collectives.inside(found, name, module))
        if sent:
            seconds = sent / chips.link_bandwidth(target)
            yield Cost(COLLECTIVES, found, name, 1, seconds, seconds, 0, sent)
        if found.opcode in CONTROL or collectives.kind_of(found):
            continue
        kind = kind_of(found, module)
        products = list(roofline.products(found, module, name))
        computing = sum(product.flops / chip.peak(product.dtype) for product in products)
        size = roofline.bytes_moved(found, module, name)
        moving = size / chip.memory
        seconds = _seconds(found, kind, computing, moving, chip)
        if seconds:
            flops = sum(product.flops for product in products)
            yield Cost(kind, found, name, 1, seconds, max(computing, moving), flops, size)


def _seconds(
    found: hlo.Instruction, kind: str, computing: float, moving: float, chip: chips.Chip
) -> float:
    """The compiler's estimate where it makes one, otherwise the roofline at `EFFICIENCY`.

    What XLA:TPU gives no cycles is too small to count or a copy beside the computing, but for a
    kernel.
    """
    if chip.clock and kind != KERNELS:
        return (found.cycles or 0) / chip.clock
    share = EFFICIENCY["products" if kind == PRODUCTS else "attention"]
    return max(computing / share, moving / EFFICIENCY["memory"])


def kind_of(found: hlo.Instruction, module: hlo.Module) -> str:
    """The kind of an instruction that computes."""
    target = found.attribute(r'custom_call_target="([^"]*)"')
    if target.startswith(KERNEL_CALLS):
        return KERNELS
    inside = _opcodes(found, module)
    if inside <= MOVES:
        return COPIES
    fused = target.startswith(roofline.ATTENTION)
    if fused or _ATTENTION.search(found.op_name) or found.attribute(_BATCHED):
        return ATTENTION
    libraries = (roofline.GEMM, roofline.CONVOLUTION)
    products = inside & set(roofline.PRODUCTS) or target.startswith(libraries)
    return PRODUCTS if products else ELEMENTWISE


def _opcodes(found: hlo.Instruction, module: hlo.Module) -> set[str]:
    """The opcodes of an instruction, of a fusion those inside."""
    if found.opcode != "fusion":
        return {found.opcode}
    return {
        opcode
        for called in found.called
        for inner in module.computations.get(called, {}).values()
        for opcode in _opcodes(inner, module)
    }


def _repeat(cost: Cost, times: int) -> Cost:
    return cost._replace(
        runs=times,
        seconds=times * cost.seconds,
        bound=times * cost.bound,
        flops=times * cost.flops,
        bytes=times * cost.bytes,
    )


def _shape(found: hlo.Instruction) -> str:
    return ", ".join(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in found.results[:2])


def record(prediction: Prediction, flops: float, peak: float) -> dict[str, Any]:
    """The part of a row of the ledger: milliseconds, by kind and in sum, and MFU."""
    return {
        "predicted_ms": 1e3 * prediction.seconds,
        "predicted_ms_without_kernels": 1e3 * prediction.seconds_without_kernels,
        "predicted_ms_at_least": 1e3 * prediction.bound,
        "silent_kernels": prediction.silent_kernels,
        "predicted_mfu": prediction.mfu(flops, peak),
        "predicted_ms_by_kind": {kind: 1e3 * s for kind, s in prediction.by_kind.items()},
    }
