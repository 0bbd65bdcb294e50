"""FLOPs and bytes of main memory of one instruction of a compiled program, from its shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dinosae_jax.perf import hlo

PRODUCTS = ("dot", "convolution")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"}
# Read a part of their first operand, as large as their result; change a part of it in place.
SLICES = ("slice", "dynamic-slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> the operand with the new values
WORKSPACE = ("s8", "u8")
GEMM = "__cublas$"
CONVOLUTION = "__cudnn$conv"
ATTENTION = "__cudnn$fmha"
# Products of [t, d] x [d, s] that attention takes: scores and mixture; its gradient recomputes the
# scores and makes four more (FlashAttention-2, arXiv:2307.08691, section 2.3.2).
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5}


class Product(NamedTuple):
    """A matrix product or convolution: its FLOPs, 2 per multiply-add, and its widest factor."""

    flops: int
    dtype: str


def products(
    instruction: hlo.Instruction, module: hlo.Module, computation: str
) -> Iterator[Product]:
    """The matrix products and convolutions of an instruction, of a fusion those inside.

    What a fusion computes element by element is not counted: its bytes take longer. A call of a
    library (cuBLAS, cuDNN) counts by its shapes, a hand-written kernel by its own estimate.
    """
    body = module.computations[computation]
    if instruction.opcode == "custom-call":
        yield Product(_library_flops(instruction, body), _widest(instruction, body))
    elif instruction.opcode in PRODUCTS:
        yield Product(_product_flops(instruction, body), _widest(instruction, body))
    elif instruction.opcode == "fusion":
        for called in instruction.called:
            for inner in module.computations.get(called, {}).values():
                yield from products(inner, module, called)


def _widest(instruction: hlo.Instruction, body: hlo.Computation) -> str:
    dtypes = [found[0].dtype for found in shapes(instruction.operands[:2], body) if found]
    return max(dtypes, key=hlo.bits, default="bf16")


def bytes_moved(instruction: hlo.Instruction, module: hlo.Module, computation: str) -> int:
    """Bytes that an instruction reads from and writes to the main memory, each array once.

    Of an array that is only sliced, the slices count; of one that is updated in place, the update.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    if estimate := kernel_estimate(instruction):
        return estimate["bytes_accessed"]
    body = module.computations[computation]
    read = sum(
        _read(instruction, index, module, body) for index in range(len(instruction.operands))
    )
    return read + _written(instruction, module, body)


def kernel_estimate(instruction: hlo.Instruction) -> dict[str, int]:
    """What a hand-written TPU kernel says of itself (Pallas' CostEstimate); {} where it is silent.

    Returns:
      flops, bytes_accessed, transcendentals.
    """
    found = instruction.attribute(r'"cost_estimate":(\{[^}]*\})')
    return {name: int(value) for name, value in json.loads(found).items()} if found else {}


def shapes(names: Iterable[str], body: hlo.Computation) -> list[tuple[hlo.Shape, ...]]:
    """Types of the instructions of a computation by their names."""
    return [body[name].results if name in body else () for name in names]


def _product_flops(product: hlo.Instruction, body: hlo.Computation) -> int:
    left, right = (found[0] for found in shapes(product.operands[:2], body))
    if product.opcode == "dot":
        contracted = hlo.numbers(product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2 * product.results[0].size * math.prod(left.dims[d] for d in contracted)
    return _convolution_flops(product, left, right)


def _convolution_flops(product: hlo.Instruction, left: hlo.Shape, right: hlo.Shape) -> int:
    """Of a convolution; XLA:TPU writes its matrix products, batched ones too, as convolutions."""
    inputs, kernel, outputs = re.split("_|->", product.attribute(r"dim_labels=(\w+->\w+)"))
    result = product.results[0]
    total = 2 * result.dims[outputs.index("b")] * result.dims[outputs.index("f")]
    total *= right.dims[kernel.index("i")]
    window = _window(product)
    for number, spatial in enumerate(sorted(set(inputs) - {"b", "f"})):
        sizes = {key: values[number] for key, values in window.items()}
        total *= _taps(
            left.dims[inputs.index(spatial)],
            right.dims[kernel.index(spatial)],
            result.dims[outputs.index(spatial)],
            **sizes,
        )
    return total


def _window(product: hlo.Instruction) -> dict[str, list[int]]:
    """Stride, padding below and dilations of each spatial dimension."""
    text = product.attribute(r"window=\{([^}]*)\}")
    fields = dict(field.split("=") for field in text.split())
    count = len(fields.get("size", "").split("x")) if fields else 0
    plain = "x".join(["1"] * count)
    padding = fields.get("pad", "x".join(["0_0"] * count))
    return {
        "stride": _sides(fields.get("stride", plain)),
        "below": [int(pair.split("_")[0]) for pair in padding.split("x") if pair],
        "left_dilation": _sides(fields.get("lhs_dilate", plain)),
        "right_dilation": _sides(fields.get("rhs_dilate", plain)),
    }


def _sides(text: str) -> list[int]:
    return [int(side) for side in text.split("x") if side]


def _taps(
    inputs: int,
    taps: int,
    outputs: int,
    stride: int,
    below: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of an output and a tap that meet an input, neither padding nor a hole of a dilation."""
    where = np.arange(outputs)[:, None] * stride - below
    where = where + np.arange(taps)[None, :] * right_dilation
    inside = (where >= 0) & (where <= (inputs - 1) * left_dilation) & (where % left_dilation == 0)
    return int(inside.sum())


def _library_flops(call: hlo.Instruction, body: hlo.Computation) -> int:
    if estimate := kernel_estimate(call):
        return estimate["flops"]
    target = call.attribute(r'custom_call_target="([^"]*)"')
    operands = [found[0] for found in shapes(call.operands, body) if found]
    if target.startswith(GEMM):
        dims = call.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]').replace('"', "")
        left = operands[0].dims
        return 2 * call.results[0].size * math.prod(left[d] for d in hlo.numbers(dims))
    if target.startswith(ATTENTION):
        way = "backward" if "Backward" in target else "forward"
        scores = call.attribute(r'"intermediate_tensor_shape":.*?"dimensions":\[([^\]]*)\]')
        pairs = math.prod(hlo.numbers(scores.replace('"', "")))
        return 2 * ATTENTION_PRODUCTS[way] * pairs * operands[0].dims[-1]
    if target.startswith(CONVOLUTION):
        return _cudnn_flops(call, target, operands)
    return 0


def _cudnn_flops(call: hlo.Instruction, target: str, operands: list[hlo.Shape]) -> int:
    """Of a convolution and its gradients: each output meets the kernel of one output channel."""
    kernel_labels = call.attribute(r"dim_labels=\w+_(\w+)->")
    backward_filter = "BackwardFilter" in target
    kernel = call.results[0] if backward_filter else operands[1]
    small = {"BackwardInput": operands[0], "BackwardFilter": operands[1]}
    output = next((s for way, s in small.items() if way in target), call.results[0])
    return 2 * output.size * kernel.size // kernel.dims[kernel_labels.index("o")]


def _read(
    instruction: hlo.Instruction, index: int, module: hlo.Module, body: hlo.Computation
) -> int:
    """Bytes of main memory that an instruction reads of one operand."""
    name = instruction.operands[index]
    whole = sum(s.bytes for s in body[name].results if not s.space) if name in body else 0
    if not whole or instruction.opcode in FREE:
        return 0
    if instruction.opcode in SLICES and index == 0:
        return min(whole, sum(shape.bytes for shape in instruction.results))
    if instruction.opcode in UPDATES and index == 0:
        return 0
    if instruction.opcode == "fusion":
        inner = module.computations.get(instruction.called[0], {})
        return min(whole, sum(_read_inside(p, module, inner) for p in _parameter(inner, index)))
    return whole


def _read_inside(name: str, module: hlo.Module, body: hlo.Computation) -> int:
    """Bytes that a fusion reads of one of its parameters, whatever memory holds it."""
    total = 0
    for user in body.values():
        for index, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                total += _read_inside(user.name, module, body)
            else:
                total += _read(user, index, module, body)
    return total


def _parameter(body: hlo.Computation, index: int) -> list[str]:
    return [
        found.name
        for found in body.values()
        if found.opcode == "parameter" and found.literal == str(index)
    ]


def _written(instruction: hlo.Instruction, module: hlo.Module, body: hlo.Computation) -> int:
    """Bytes of main memory that an instruction writes."""
    made = instruction.results
    if instruction.opcode == "custom-call":  # a library's last array is its workspace
        made = tuple(shape for shape in made if shape.dtype not in WORKSPACE)
    results = [shape.bytes for shape in made if not shape.space]
    if instruction.opcode in UPDATES and results:
        update = instruction.operands[UPDATES[instruction.opcode]]
        return sum(shape.bytes for shape in body[update].results)
    if instruction.opcode != "fusion":
        return sum(results)
    inner = module.computations.get(instruction.called[0], {})
    roots = [found for found in inner.values() if found.root]
    roots = [inner[n] for r in roots for n in r.operands] if _is_tuple(roots) else roots
    sizes = [_made(root, inner) for root in roots]
    if len(sizes) != len(made):
        return sum(results)
    return sum(size for size, shape in zip(sizes, made, strict=True) if not shape.space)


def _is_tuple(roots: list[hlo.Instruction]) -> bool:
    return bool(roots) and roots[0].opcode == "tuple"


def _made(root: hlo.Instruction, body: hlo.Computation) -> int:
    """Bytes that a result of a fusion writes: of an update in place the update."""
    while root.opcode == "bitcast" and root.operands[0] in body:
        root = body[root.operands[0]]
    if root.opcode in UPDATES:
        update = root.operands[UPDATES[root.opcode]]
        return sum(shape.bytes for shape in body[update].results)
    return sum(shape.bytes for shape in root.results)
