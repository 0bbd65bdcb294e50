"""Attention with whole rows of scores in a TPU core's own memory: one Pallas kernel each way.

A step of the grid is one example with all its heads. It reads the fused projection as the matrix
product made it, so that no head is sliced or transposed in main memory, turns queries and keys,
and keeps the scores of one head at a time: rows are short enough to need no running maximum
(FlashAttention, arXiv 2205.14135, is for rows that are not). The backward kernel computes the
scores again and needs nothing but the projection.

Heads need not be aligned to the 128 lanes of a vector register. A head's products run over the
registers that it touches, with the lanes of other heads set to zero in one factor: the matrix unit
works on whole registers anyway, while cutting 72 lanes out of two registers took four times as
long (compiler's estimate, v6e, 16 heads of width 72).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Tables = tuple[jax.Array, jax.Array]
LANES = 128
_BYTES = 40  # per token and channel in the backward kernel: two windows of each array, scratch
_SCORE_BYTES = 20  # per score of a head: five float32 arrays


def memory(tokens: int, width: int) -> int:
    """Bytes of a core's memory that the backward kernel, the larger of the two, takes."""
    return tokens * width * _BYTES + tokens * tokens * _SCORE_BYTES


def turns_within_registers(width: int, distance: int) -> bool:
    """Whether the two channels of every rotated pair lie in the same register of lanes."""
    return min(LANES, width) % (2 * distance) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attend(
    qkv: jax.Array, tables: Tables | None, num_heads: int, distance: int, interpret: bool = False
) -> jax.Array:
    """Self-attention of a fused projection.

    Args:
      qkv: [b, n, 3 * d] bfloat16 (any float if interpreted): queries, keys and values, each with
        its heads side by side.
      tables: cosines and sines of the rotation of queries and keys, [n, d] float32 each, or None.
      num_heads: heads, which divide d.
      distance: channels between the two of a rotated pair; see `turns_within_registers`.
      interpret: runs the kernels on a CPU.

    Returns:
      [b, n, d] like qkv.
    """
    b, n, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    kernel = functools.partial(_forward_kernel, num_heads)
    return _call(kernel, "attention_forward", 2, (qkv,), tables, distance, (b, n, d), interpret)


def _attend_forward(
    qkv: jax.Array, tables: Tables | None, num_heads: int, distance: int, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, Tables | None]]:
    return attend(qkv, tables, num_heads, distance, interpret), (qkv, tables)


def _attend_backward(
    num_heads: int,
    distance: int,
    interpret: bool,
    residuals: tuple[jax.Array, Tables | None],
    cotangent: jax.Array,
) -> tuple[jax.Array, None]:
    qkv, tables = residuals
    kernel, arrays = functools.partial(_backward_kernel, num_heads), (qkv, cotangent)
    name = "attention_backward"
    return _call(kernel, name, 5, arrays, tables, distance, qkv.shape, interpret), None


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any,
    name: str,
    products: int,
    arrays: tuple[jax.Array, ...],
    tables: Tables | None,
    distance: int,
    shape: tuple[int, ...],
    interpret: bool,
) -> jax.Array:
    """Runs a kernel of so many matrix products per head on each example: [b, n, ...] of `shape`."""
    qkv = arrays[0]
    b, n, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    constants: tuple[jax.Array, ...] = ()
    if tables is not None:
        exchange = jnp.asarray(_exchange(min(LANES, d), distance), qkv.dtype)
        constants = (*tables, exchange)
    # Constants stay where they are from one example to the next: one window is enough.
    once = [
        pl.BlockSpec(x.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1)) for x in constants
    ]
    out: Any = jax.ShapeDtypeStruct(shape, qkv.dtype)
    example = [pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0)) for x in (*arrays, out)]
    heads = kernel.args[0]
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out,
        grid=(b,),
        in_specs=[*example[:-1], *once],
        out_specs=example[-1],
        scratch_shapes=[pltpu.VMEM((n, d), qkv.dtype)] * 2,
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * b * n * n * d,
            transcendentals=b * heads * n * n,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *constants, out)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=2 * memory(n, d)
        ),
        interpret=interpret,
    )(*arrays, *constants)


def _forward_kernel(heads: int, qkv: Any, *refs: Any) -> None:
    """Refs: qkv [1, n, 3d], the constants, out [1, n, d], scratch for q and k [n, d]."""
    *constants, out, q_turned, k_turned = refs
    q_all, k_all, v_all = _turned(qkv, constants, q_turned, k_turned)
    for head in range(heads):
        lanes, mine = _lanes_of(head, heads, q_all.shape)
        q = jnp.where(mine, q_all[:, lanes], 0)
        scores = _dot(q, k_all[:, lanes], 1, 1) * _scale(heads, q_all.shape)
        weights, total = _exponentials(scores, axis=1)
        mixed = _dot(weights.astype(out.dtype), v_all[:, lanes], 1, 0) / total
        _put(out.at[0], lanes, mine, mixed)


def _backward_kernel(heads: int, qkv: Any, cotangent: Any, *refs: Any) -> None:
    """Refs: qkv [1, n, 3d], cotangent [1, n, d], the constants, gradient [1, n, 3d], scratch.

    Scores have a row for each key here: that leaves one product of five with a transposed factor.
    """
    *constants, gradient, q_turned, k_turned = refs
    q_all, k_all, v_all = _turned(qkv, constants, q_turned, k_turned)
    dq_all, dk_all, dv_all = _thirds(gradient)
    scale, dtype = _scale(heads, q_all.shape), gradient.dtype
    for head in range(heads):
        lanes, mine = _lanes_of(head, heads, q_all.shape)
        q, above = (jnp.where(mine, x, 0) for x in (q_all[:, lanes], cotangent[0, :, lanes]))
        weights, total = _exponentials(_dot(k_all[:, lanes], q, 1, 1) * scale, axis=0)
        weights = weights / total
        _put(dv_all, lanes, mine, _dot(weights.astype(dtype), above, 1, 0))
        d_weights = _dot(v_all[:, lanes], above, 1, 1)
        centred = d_weights - (weights * d_weights).sum(0, keepdims=True)
        d_scores = (weights * centred * scale).astype(dtype)
        _put(dk_all, lanes, mine, _dot(d_scores, q, 1, 0))
        _put(dq_all, lanes, mine, _dot(d_scores, k_all[:, lanes], 0, 0))
    for ref in (dq_all, dk_all) if constants else ():
        _turn(ref, ref, constants, backwards=True)


def _exponentials(scores: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """exp(scores - their maximum along the keys' axis) and the sums along it, float32."""
    weights = jnp.exp(scores - scores.max(axis, keepdims=True))
    return weights, weights.sum(axis, keepdims=True)


def _scale(heads: int, shape: tuple[int, ...]) -> float:
    return (shape[-1] // heads) ** -0.5


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _lanes_of(head: int, heads: int, shape: tuple[int, ...]) -> tuple[slice, jax.Array]:
    """The registers' lanes that hold a head, and which of them are its own, [n, lanes] bool."""
    n, d = shape
    first, last = head * d // heads, (head + 1) * d // heads
    lanes = slice(first // LANES * LANES, min(-(-last // LANES) * LANES, d))
    lane = jax.lax.broadcasted_iota(jnp.int32, (n, lanes.stop - lanes.start), 1) + lanes.start
    return lanes, (lane >= first) & (lane < last)


def _put(ref: Any, lanes: slice, mine: jax.Array, value: jax.Array) -> None:
    """Writes a head's own lanes and leaves the others as they are."""
    ref[:, lanes] = jnp.where(mine, value.astype(ref.dtype), ref[:, lanes])


def _thirds(fused: Any) -> list[Any]:
    """Views [n, d] of queries, keys and values in [1, n, 3d]."""
    d = fused.shape[-1] // 3
    return [fused.at[0, :, slice(i * d, (i + 1) * d)] for i in range(3)]


def _turned(qkv: Any, constants: list[Any], q_turned: Any, k_turned: Any) -> tuple[Any, Any, Any]:
    """Queries and keys after the rotation, and the values, [n, d] each."""
    q, k, v = _thirds(qkv)
    if not constants:
        return q, k, v
    _turn(q, q_turned, constants)
    _turn(k, k_turned, constants)
    return q_turned, k_turned, v


def _turn(source: Any, target: Any, constants: list[Any], backwards: bool = False) -> None:
    """Rotates pairs of channels, in float32 but for the exact exchange within the pairs."""
    cosine, sine, exchange = constants
    step = exchange.shape[0]
    for start in range(0, source.shape[-1], step):
        lanes = slice(start, start + step)
        x = source[:, lanes]
        partner = _dot(x, exchange[...], 1, 0) * sine[:, lanes]
        straight = x.astype(jnp.float32) * cosine[:, lanes]
        turned = straight - partner if backwards else straight + partner
        target[:, lanes] = turned.astype(target.dtype)


def _exchange(lanes: int, distance: int) -> np.ndarray:
    """Matrix that takes a pair (a, b) to (-b, a): entries 0, 1 and -1, [lanes, lanes] float32.

    As a product it costs the matrix unit little; as rotations of lanes it costs twice the time.
    """
    matrix = np.zeros((lanes, lanes), np.float32)
    first = np.flatnonzero(np.arange(lanes) // distance % 2 == 0)
    matrix[first + distance, first], matrix[first, first + distance] = -1.0, 1.0
    return matrix
