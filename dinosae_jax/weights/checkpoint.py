"""Checkpoints of a run: Orbax, asynchronous, committed whole or not at all.

A checkpoint holds the state and a record (JSON): the resolved config, the latent convention, the
frozen networks by path and hash, the shapes, and a checksum of every leaf. The checksums are
compared when the state comes back, so that a damaged file cannot turn into different weights.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from dinosae_jax.runtime import jit

Tree = Any
FOLDER = "checkpoints"


def open_manager(workdir: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; it saves in the background and keeps `keep` newest."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
    )
    return ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: Tree, record: dict[str, Any]) -> None:
    """Starts saving the state under its step; a step that is already there is left alone.

    Args:
      manager: from `open_manager`.
      state: has a field `step`.
      record: JSON-like; shapes and checksums are added.

    Raises:
      OSError: where the disk is full; the last committed checkpoint is still good.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    record = {**record, "shapes": _shapes(state), "checksums": checksums(state)}
    record["sha256"] = _digest(record)
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
    )
    with explain_full_disk(manager):
        manager.save(step, args=arguments)


def wait(manager: ocp.CheckpointManager) -> None:
    """Blocks until every started save is committed; raises OSError where the disk is full."""
    with explain_full_disk(manager):
        manager.wait_until_finished()


def restore_newest(
    manager: ocp.CheckpointManager, target: Tree
) -> tuple[Tree, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its record; None where none was ever written.

    A damaged checkpoint is renamed `<step>.damaged` and the one before it is tried.

    Args:
      manager: from `open_manager`.
      target: the state as jax.ShapeDtypeStruct leaves with the shardings wanted.

    Raises:
      ValueError: where a good checkpoint holds another architecture, or none is whole.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            record = read_record(manager, step)
        except Exception as error:
            damaged.append(_set_aside(manager, step, error))
            continue
        _check_shapes(record["shapes"], _shapes(target), manager.directory / str(step))
        try:
            state = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )["state"]
            _check_sums(state, record["checksums"])
        except (MemoryError, RuntimeError):  # a full device, say, is no damage
            raise
        except Exception as error:
            damaged.append(_set_aside(manager, step, error))
            continue
        return state, record
    if damaged:
        raise ValueError(
            f"a run goes on from a checkpoint that is whole; got none in {manager.directory}, they "
            f"are kept as {', '.join(damaged)}; put a good one back, or run the same command again "
            "to start from step 0"
        )
    return None


def load_fields(folder: pathlib.Path, fields: tuple[str, ...]) -> tuple[Tree, dict[str, Any]]:
    """Some fields of the state of one checkpoint, as numpy arrays.

    Args:
      folder: `workdir/checkpoints/<step>`.
      fields: names of fields or of parts of them, such as 'ema' or 'params/disc_heads'.

    Returns:
      ({field: nested dict of arrays}, record).

    Raises:
      ValueError: where the checkpoint is damaged.
    """
    with ocp.CheckpointManager(folder.parent.absolute()) as manager:
        record = read_record(manager, int(folder.name))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=place)
        for name, (shape, dtype) in record["shapes"].items()
        if any(f"{name}/".startswith(f"{field}/") for field in fields)
    }
    target = traverse_util.unflatten_dict(flat, sep="/")
    arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(folder.absolute() / "state", args=arguments)
    _check_sums(tree, {name: record["checksums"][name] for name in flat})
    return jax.device_get(tree), record


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of the newest committed checkpoint of a workdir."""
    steps = [path for path in (workdir / FOLDER).glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record that was saved with a step; ValueError where it is not as it was saved."""
    arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = manager.restore(step, args=arguments)["record"]
    if record.pop("sha256", None) != _digest(record):
        raise ValueError("the record differs from its sha256")
    return record


def checksums(state: Tree) -> dict[str, int]:
    """A 32-bit checksum of the bits of each leaf, the same on any number of devices."""
    sums = jax.device_get([_compiled_checksum()(leaf) for leaf in jax.tree.leaves(state)])
    return {name: int(value) for name, value in zip(_names(state), sums, strict=True)}


@functools.cache
def _compiled_checksum() -> Callable[[jax.Array], jax.Array]:
    # A program a shape: the stages of a chain share them, one of all leaves they would not.
    return jit.jit_once(_checksum)


def _checksum(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
    # The position is mixed in, so that an exchange of two values is seen too.
    mixed = bits + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


@contextlib.contextmanager
def explain_full_disk(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns the many ways in which a full disk shows up into one sentence, an OSError."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the other writers' tracebacks
        step = manager.latest_step()
        kept = "no checkpoint is complete yet" if step is None else f"that of step {step} is safe"
        raise OSError(
            f"the disk of {manager.directory} is full; {kept}; free some space and run the same "
            "command again"
        ) from error


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _names(tree: Tree) -> list[str]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _shapes(tree: Tree) -> dict[str, list[Any]]:
    leaves = jax.tree.leaves(tree)
    return {
        name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
        for name, leaf in zip(_names(tree), leaves, strict=True)
    }


def _check_shapes(saved: dict[str, Any], wanted: dict[str, Any], path: Any) -> None:
    names = sorted({*saved, *wanted})
    wrong = [n for n in names if saved.get(n) != wanted.get(n)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} holds another architecture: {len(wrong)} arrays differ, first {name} "
            f"({saved.get(name)} there, {wanted.get(name)} in this config); use the config that "
            "made it or another --workdir"
        )


def _check_sums(state: Tree, expected: dict[str, int]) -> None:
    found = checksums(state)
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays differ from their checksums, first {wrong[0]}")


def _set_aside(manager: ocp.CheckpointManager, step: int, error: Exception) -> str:
    """Renames a damaged checkpoint, says so, and returns its new name."""
    path = pathlib.Path(manager.directory) / str(step)
    aside = path.with_name(f"{step}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{step}.damaged{number}")
    path.rename(aside)
    manager.reload()
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"The checkpoint of step {step} is damaged ({reason[:200]}); it is kept as {aside}.")
    return aside.name
