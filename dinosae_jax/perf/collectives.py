"""A census of the collectives in a compiled program, from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
# `%name (parameters) -> type {` opens a computation, `%name = type kind(operands), ...` is a line.
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Use:
    """Executions and bytes of one kind of collective in one step.

    Attributes:
      runs: executions; the body of a loop counts once per iteration.
      bytes: bytes of the results on one device, all executions together.
    """

    runs: int
    bytes: int


def census(text: str) -> dict[str, Use]:
    """Collectives by kind of an optimised HLO module.

    Args:
      text: `compiled.as_text()`.

    Returns:
      kind -> use, for the kinds that occur. An all-reduce that XLA:TPU fuses with the slice of its
      result is a reduce-scatter.
    """
    computations, entry = _read(text)
    totals: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in totals:
            totals[name] = Counter(computations[name].own)
            for called, turns in computations[name].calls:
                times = computations[turns].bound if isinstance(turns, str) else turns
                if called in computations:
                    for key, value in total(called).items():
                        totals[name][key] += times * value
        return totals[name]

    counts = total(entry)
    return {
        kind: Use(counts[f"{kind} count"], counts[f"{kind} bytes"])
        for kind in KINDS
        if counts[f"{kind} count"]
    }


@dataclasses.dataclass
class _Computation:
    """Its own collectives; what it calls, and how often or under which condition; its constant.

    XLA:TPU's text leaves out a loop's number of iterations: it is the constant with which the
    condition of a scan compares its counter.
    """

    own: Counter[str]
    calls: list[tuple[str, int | str]]
    bound: int = 1


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened.group(1)
            computations[name] = _Computation(Counter(), [])
            if line.startswith("ENTRY"):
                entry = name
        elif (bound := _CONSTANT.match(line)) and name:
            computations[name].bound = max(computations[name].bound, int(bound.group(1)))
        elif (found := _OPERATION.match(line)) and name:
            _add(computations[name], name, found.group(1), found.group(2), line)
    return computations, entry


def _add(computation: _Computation, name: str, result: str, operation: str, line: str) -> None:
    """Counts one operation; the second half of an asynchronous pair was counted with the first."""
    if operation.endswith(("-done", "-update")):
        return
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        computation.own[f"{kind} count"] += 1
        computation.own[f"{kind} bytes"] += _bytes(result, operation)
        return  # its reduction of pairs of scalars has no collective
    turns: int | str = 1
    if operation == "while" and (condition := _CONDITION.search(line)):
        known = _TRIPS.search(line)
        turns = int(known.group(1)) if known else condition.group(1)
    branches = _BRANCHES.search(line)
    names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
    computation.calls.extend((called, turns) for called in [*_CALLED.findall(line), *names])


def _bytes(result: str, operation: str) -> int:
    """Size of a result type in bytes; for a start's (operands, results, context), the results."""
    sizes = [
        math.prod(int(n) for n in dimensions.split(",") if n) * _bits(kind) // 8
        for kind, dimensions in _SHAPE.findall(result)
    ]
    if operation in ("all-gather-start", "collective-permute-start", "all-to-all-start"):
        sizes = [size for size in sizes if size > 8]  # drops the context's counters
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return _BITS.get(kind) or (int(digits.group()) if digits else 0)
