"""Means over micro-batches, for batches that do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dinosae_jax.runtime import fsdp

Tree = Any
Result = TypeVar("Result")


def mean_over_micro_batches(
    one: Callable[..., Result], parts: tuple[Tree, ...], count: int, independent: bool = True
) -> Result:
    """Means over `count` micro-batches, each split over all devices: equal to one large batch.

    Where every device holds whole parameters, it sums its own examples' parts over all
    micro-batches, and the devices' sums are reduced once, after the last. Split parameters cannot
    wait: their gradients are scattered after each micro-batch, since no device has room for all.

    Args:
      one: (*parts of a micro-batch) -> tree of means over its examples.
      parts: trees of arrays [b, ...]; `count` divides b.
      count: number of micro-batches.
      independent: whether the examples are, which batch norm's are not.
    """
    if count == 1:
        return one(*parts)

    def mean(parts: tuple[Tree, ...]) -> Result:
        return _mean(one, parts, count)

    return (mean if fsdp.is_split() or not independent else fsdp.mean_per_device(mean))(parts)


def _mean(one: Callable[..., Result], parts: tuple[Tree, ...], count: int) -> Result:
    def split(x: jax.Array) -> jax.Array:
        # Example i goes to micro-batch i % count, so that each micro-batch is on all devices.
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    micro = jax.tree.map(split, parts)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], micro))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Result, part: tuple[Tree, ...]) -> tuple[Result, None]:
        return jax.tree.map(lambda a, b: a + b / count, total, one(*part)), None

    return jax.lax.scan(add, start, micro)[0]
