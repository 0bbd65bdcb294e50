"""Compiled functions applied to long arrays and long streams of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from dinosae_jax.runtime import sharding


def map_batches(
    function: Callable[[jax.Array], Any],
    array: NDArray[Any],
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Any:
    """Applies a jitted function to [b, ...] in batches over the devices.

    The batch size of a short array is the next power of two, so that few sizes are compiled. The
    last batch is padded with copies of the last example, whose results are dropped.

    Args:
      function: [size, ...] -> tree of [size, ...].
      array: [b, ...], b at least 1, the same on every process.
      batch_size: examples at once, rounded up to a multiple of the devices.
      mesh: the devices.

    Returns:
      The tree of numpy arrays [b, ...].
    """
    size = min(batch_size, 1 << (len(array) - 1).bit_length())
    size += -size % mesh.size
    place = sharding.batch_sharding(mesh)
    results = []
    for start in range(0, len(array), size):
        kept = array[start : start + size]
        filled = np.concatenate([kept, np.repeat(kept[-1:], size - len(kept), axis=0)])
        batch = jax.make_array_from_callback(filled.shape, place, filled.__getitem__)
        with jax.set_mesh(mesh):
            made = function(batch)
        results.append(jax.tree.map(sharding.gather, made))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(array)], *results)


def regroup(batches: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The rows of arrays [b, ...] of any lengths as arrays [size, ...]; the last may be shorter."""
    held: list[NDArray[Any]] = []
    for batch in batches:
        held.append(batch)
        while (total := sum(len(array) for array in held)) >= size:
            rows = np.concatenate(held)
            yield rows[:size]
            held = [rows[size:]] if total > size else []
    if held:
        yield np.concatenate(held)


def one_behind(items: Iterator[Any]) -> Iterator[Any]:
    """Yields each item after the next has been made, so that devices do not wait for hosts."""
    nothing = object()
    previous: Any = nothing
    for item in items:
        if previous is not nothing:
            yield previous
        previous = item
    if previous is not nothing:
        yield previous
