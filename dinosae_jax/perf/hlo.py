"""Reads the text of a compiled HLO module: its computations and what each instruction says."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
# `%name (parameters) -> type {` opens a computation; `%name = type opcode(operands), ...`.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(\S+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Shape(NamedTuple):
    """An array's type.

    Attributes:
      dtype: XLA's name, such as 'bf16'.
      dims: its dimensions.
      space: the memory that holds it, 0 for the device's main memory (1 is a TPU's VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return self.size * bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, one in the module.
      opcode: such as 'fusion' or 'all-gather-start'.
      results: the arrays that it makes; those of a tuple flattened.
      operands: names of instructions of the same computation.
      literal: what stands between its parentheses: a constant's value, a parameter's number.
      attributes: the rest of the line.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """The path of the operation in the traced program, '' where the compiler kept none."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int | None:
        """XLA:TPU's own estimate of its duration; it makes none of kernels and collectives."""
        found = _CYCLES.search(self.attributes)
        return int(found.group(1)) if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, branches last."""
        names = [name for _, name in _CALLED.findall(self.attributes)]
        return (*names, *self.branches)

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of which a conditional runs one."""
        found = _BRANCHES.findall(self.attributes)
        return tuple(name for group in found for name in re.findall(r"[\w.\-]+", " ".join(group)))

    def attribute(self, pattern: str) -> str:
        """First group of the first match of a regular expression in the attributes, or ''."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name, each after those that it calls.
      entry: the name of the one that is run.
      devices: how many run it together.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int

    def executions(
        self, follow: Callable[[Instruction], Iterable[str]] = lambda found: found.called
    ) -> dict[str, int]:
        """How often each computation runs in one run of the entry.

        Args:
          follow: instruction -> the computations in it that count; by default all that it calls,
            so every branch of a conditional.
        """
        runs = Counter({self.entry: 1})
        for name in reversed(self.computations):
            for instruction in self.computations[name].values() if runs[name] else ():
                for called in follow(instruction):
                    if called in self.computations:
                        runs[called] += runs[name] * self.trips(instruction)
        return dict(runs)

    def trips(self, instruction: Instruction) -> int:
        """How often an instruction runs what it calls: a loop's iterations, otherwise once.

        XLA:TPU's text leaves out a loop's number of iterations: it is the constant with which the
        condition of a scan compares its counter. A loop without one counts once.
        """
        if instruction.opcode != "while":
            return 1
        if known := instruction.attribute(_TRIPS.pattern):
            return int(known)
        return max([1, *self._constants(instruction.attribute(r"\bcondition=%?([\w.\-]+)"))])

    def _constants(self, computation: str) -> list[int]:
        """Integer scalars of a computation and of those that it calls."""
        found = []
        for instruction in self.computations.get(computation, {}).values():
            if instruction.opcode == "constant" and instruction.results[0].dtype == "s32":
                found += [int(instruction.literal)] if instruction.literal.isdigit() else []
            for called in instruction.called:
                found += self._constants(called)
        return found


def bits(dtype: str) -> int:
    """Bits of one element of an XLA type such as 'bf16', 's4' or 'pred'."""
    digits = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits.group()) if digits else 0


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`; lines that are no instructions of a computation are skipped."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations[opened.group(2)] = {}
            entry = opened.group(2) if opened.group(1) else entry
        elif head := _NAME.match(line):
            instruction = _instruction(head.group(2), bool(head.group(1)), line[head.end() :])
            current[instruction.name] = instruction
    header = text[: text.find("\n")]
    counts = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", header)
    return Module(computations, entry, math.prod(int(count) for count in counts))


def _instruction(name: str, root: bool, text: str) -> Instruction:
    """From `type opcode(operands), attributes`, where a tuple's type has spaces and parentheses."""
    kind = text[: _closing(text, 0) + 1] if text.startswith("(") else text[: text.index(" ")]
    opened = text.index("(", len(kind))
    closed = _closing(text, opened)
    inside = text[opened + 1 : closed]
    shapes = (
        Shape(dtype, numbers(dims), int(space.group(1)) if (space := _SPACE.search(layout)) else 0)
        for dtype, dims, layout in _SHAPE.findall(kind)
    )
    return Instruction(
        name,
        text[len(kind) : opened].strip(),
        tuple(shapes),
        tuple(_OPERAND.findall(inside)),
        inside,
        text[closed + 1 :],
        root,
    )


def _closing(text: str, opened: int) -> int:
    """Index of the parenthesis that closes the one at `opened`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
