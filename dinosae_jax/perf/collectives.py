"""A census of the collectives in a compiled program, from its text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dinosae_jax.perf import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
STARTS = ("all-gather-start", "collective-permute-start", "all-to-all-start")
_LISTED = r"replica_groups=\{\{([\d,]+)\}"
_IOTA = r"replica_groups=\[\d+,(\d+)\]<="  # two groups of 8 are [2, 8]<=[16]


@dataclasses.dataclass(frozen=True)
class Use:
    """Executions and bytes of one kind of collective in one step.

    Attributes:
      runs: executions; the body of a loop counts once per iteration.
      bytes: bytes of the results on one device, all executions together.
    """

    runs: int
    bytes: int


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`. An all-reduce that XLA:TPU fuses with the slice of its result is a
        reduce-scatter.
      instruction: its line, for an asynchronous pair the first.
      runs: executions in one step.
      results: the arrays that it delivers to one device; for a fused reduce-scatter before the
        slice.
      whole: whether the results of a reduce-scatter are whole, as those of a fused one are.
      members: devices of a group.
    """

    kind: str
    instruction: hlo.Instruction
    runs: int
    results: tuple[hlo.Shape, ...]
    whole: bool
    members: int

    @property
    def bytes(self) -> int:
        """Bytes of the results of one execution."""
        return sum(shape.bytes for shape in self.results)

    @property
    def link_bytes(self) -> int:
        """Bytes that one device sends in one execution, by a ring."""
        n = self.members
        if self.kind == "collective-permute":
            return self.bytes
        rounds = {"all-reduce": 2, "reduce-scatter": 1 if self.whole else n}.get(self.kind, 1)
        return rounds * self.bytes * (n - 1) // n


def census(text: str) -> dict[str, Use]:
    """Collectives by kind of an optimised HLO module, `compiled.as_text()`."""
    return uses(hlo.parse(text))


def uses(module: hlo.Module) -> dict[str, Use]:
    """Collectives by kind, for the kinds that occur."""
    runs, sizes = Counter[str](), Counter[str]()
    for found in collectives(module):
        runs[found.kind] += found.runs
        sizes[found.kind] += found.runs * found.bytes
    return {kind: Use(runs[kind], sizes[kind]) for kind in KINDS if runs[kind]}


def collectives(module: hlo.Module) -> Iterator[Collective]:
    """The collectives of a module, those inside of fusions and loops included."""
    for name, runs in module.executions().items():
        for instruction in module.computations[name].values():
            if kind_of(instruction):
                yield _collective(instruction, name, runs, module)


def inside(
    instruction: hlo.Instruction, computation: str, module: hlo.Module
) -> Iterator[Collective]:
    """The collectives of one execution of an instruction: itself, or those that it fuses."""
    if kind_of(instruction):
        yield _collective(instruction, computation, 1, module)
    elif instruction.opcode == "fusion":
        for called in instruction.called:
            for inner in module.computations.get(called, {}).values():
                yield from inside(inner, called, module)


def kind_of(instruction: hlo.Instruction) -> str:
    """The kind of an instruction that is a collective, otherwise ''.

    The second half of an asynchronous pair is none: it is counted with the first.
    """
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _collective(
    instruction: hlo.Instruction, computation: str, runs: int, module: hlo.Module
) -> Collective:
    kind = kind_of(instruction)
    fused = kind == "all-reduce" and "all-reduce-scatter" in computation
    return Collective(
        "reduce-scatter" if fused else kind,
        instruction,
        runs,
        _delivered(instruction),
        fused,
        _members(instruction, module),
    )


def _delivered(instruction: hlo.Instruction) -> tuple[hlo.Shape, ...]:
    """Results; of a start's (operands, results, context) the results."""
    if instruction.opcode not in STARTS:
        return instruction.results
    arrays = [shape for shape in instruction.results if shape.bytes > 8]  # not the context
    return tuple(arrays[len(arrays) // 2 :])


def _members(instruction: hlo.Instruction, module: hlo.Module) -> int:
    """Devices of one group; without groups, all."""
    if listed := instruction.attribute(_LISTED):
        return listed.count(",") + 1
    return int(instruction.attribute(_IOTA) or module.devices)
