"""Where arrays live: a (data, fsdp) mesh placed by the rule of `runtime.fsdp`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from dinosae_jax.runtime.fsdp import BATCH_AXES, SMALLEST_SHARDED_BYTES, is_stacked, partition_rule

Tree = Any


def make_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh ('data', 'fsdp') over all devices; the batch is split over both axes.

    Raises:
      ValueError: where the devices cannot be divided into groups of `fsdp`.
    """
    devices = devices or jax.devices()
    if len(devices) % fsdp:
        raise ValueError(
            f"mesh.fsdp must divide the number of devices; got {fsdp} for {len(devices)} devices; "
            "take a divisor"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError where a micro-batch does not divide over the devices."""
    micro = batch_size // accumulation
    if micro % mesh.size:
        raise ValueError(
            "batch_size / accumulation must be a multiple of the number of devices; got "
            f"{batch_size} / {accumulation} = {micro} over {mesh.size} devices; change one of them"
        )


def shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """A sharding for every leaf by `fsdp.partition_rule`: shards over `fsdp`, or replicas.

    Raises:
      ValueError: where `fsdp` divides no axis of a large leaf, which would be copied silently.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        size = leaf.dtype.itemsize
        axes = partition_rule(leaf.shape, size, is_stacked(path), fsdp)
        if fsdp > 1 and not axes and leaf.size * size >= SMALLEST_SHARDED_BYTES:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"mesh.fsdp must divide an axis of every large leaf; got {fsdp} for {name} "
                f"{list(leaf.shape)}; take a smaller power of two (published flows: up to 128)"
            )
        return NamedSharding(mesh, axes)

    return jax.tree_util.tree_map_with_path(place, shapes)


def device_multiple(count: int, mesh: Mesh) -> int:
    """Rounds `count` up to a multiple of the number of devices."""
    return -(-count // mesh.size) * mesh.size


def local_rows(mesh: Mesh, batch_size: int) -> NDArray[np.int64]:
    """The rows of a global batch that this process's devices hold, ascending int64 [b].

    A mesh follows the interconnect (jax.make_mesh), so one host's rows need not be contiguous: on a
    v5e:4x4 the first of four hosts has the devices 0, 1, 6 and 15 of sixteen.

    Raises:
      ValueError: where the batch does not divide over the devices.
    """
    check_batch(batch_size, 1, mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in held]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's rows of a global batch (`local_rows`) to its devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copies each leaf to every device; every process must pass the same values.

    The copy goes through the host: `jax.device_put` would compare the values of all processes each
    time, and (jax 0.10) makes arrays that cannot be saved where a process has one device.

    Args:
      tree: numpy or jax arrays, whole on this process.
      mesh: the devices.
    """
    place = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(place, np.asarray(leaf)), tree
    )


def gather(value: jax.Array) -> np.ndarray:
    """The whole array, from all devices and processes."""
    if jax.process_count() == 1:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
