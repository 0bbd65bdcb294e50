"""In which dtypes a compiled program reduces: collectives, and sums over many elements."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from dinosae_jax.perf import collectives, hlo

LONG = 4096  # elements of a sum that bfloat16 (8 bits) visibly rounds


class Sum(NamedTuple):
    """A reduction by addition.

    Attributes:
      dtype: of the sum as the program keeps it, such as 'bf16'.
      elements: how many are added up for one element of the result.
      runs: executions in one step.
      op_name: where the program asks for it.
    """

    dtype: str
    elements: int
    runs: int
    op_name: str


def of_collectives(module: hlo.Module) -> dict[tuple[str, str], collectives.Use]:
    """Executions and bytes of collectives by (kind, dtype), such as ('all-reduce', 'bf16')."""
    runs, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for found in collectives.collectives(module):
        for dtype in {shape.dtype for shape in found.results}:
            runs[found.kind, dtype] += found.runs
        for shape in found.results:
            sizes[found.kind, shape.dtype] += found.runs * shape.bytes
    return {key: collectives.Use(runs[key], sizes[key]) for key in sorted(runs)}


def of_sums(module: hlo.Module, least: int) -> list[Sum]:
    """The sums over at least `least` elements, those inside of fusions and loops included.

    A compiler may split a sum over two reductions, of which each is shorter.
    """
    return [
        Sum(result.dtype, operand.size // result.size, runs, found.op_name)
        for name, runs in module.executions().items()
        for found in module.computations[name].values()
        if found.opcode == "reduce" and _adds(found, module)
        for operand, result in zip(_operands(found, module, name), found.results, strict=False)
        if operand.size >= least * result.size
    ]


def record(module: hlo.Module) -> dict[str, dict[str, int]]:
    """The part of a row of the ledger: bytes of collectives and number of long sums by dtype."""
    sums = Counter[str]()
    for found in of_sums(module, LONG):
        sums[found.dtype] += found.runs
    moved = of_collectives(module)
    return {
        "collective_bytes": {" ".join(key): use.bytes for key, use in moved.items()},
        "long_sums": dict(sorted(sums.items())),
    }


def _adds(found: hlo.Instruction, module: hlo.Module) -> bool:
    """Whether a reduction combines by addition, in whatever dtype."""
    body = module.computations.get(found.called[0], {}).values()
    return {inner.opcode for inner in body} <= {"parameter", "add", "convert", "tuple"}


def _operands(found: hlo.Instruction, module: hlo.Module, name: str) -> list[hlo.Shape]:
    """Types of the arrays that are reduced, without the initial values."""
    body = module.computations[name]
    return [body[operand].results[0] for operand in found.operands[: len(found.results)]]
