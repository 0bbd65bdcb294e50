"""Checkpoints of a run: Orbax, asynchronous, committed whole or not at all.

A checkpoint holds the state, a record and a seal. The record (JSON) has the resolved config, the
latent convention, the frozen networks by path and hash, the shapes, and a checksum of every leaf.
The checksums are compared when the state comes back, so that a damaged file cannot turn into
different weights. The seal has the sha256 of every other file. Where a checkpoint does not come
back, the seal decides why: bytes that are not those that were saved are damage, and anything else
(a permission, a server that is away, a peer that is lost, a full device) is not.

On a disk a checkpoint is committed by a rename, in a bucket by the object `commit_success.txt`,
which is written after all others. There a checkpoint that cannot be written does not stop a run:
the one before it is still good, and the next may succeed. `MOST_FAILURES` in a row stop it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from dinosae_jax.runtime import agreement, buckets, console, files, untrusted
from dinosae_jax.weights import bucket_arrays, integrity

Tree = Any
FOLDER = "checkpoints"
NEWEST = "checkpoints.json"  # in the workdir: the newest step that was ever committed
MOST_FAILURES = 3  # in a row
# Words in a key of random numbers -> jax's name of the implementation.
KEY_SIZES = {2: "threefry2x32", 4: "rbg"}
SMALLEST_SLICE = 2**20  # bytes


class NoneWhole(ValueError):
    """Every checkpoint of a workdir is damaged."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager, with the step that is being saved and how many saves in a row failed."""

    started: int | None = None
    failures = 0


@contextlib.contextmanager
def open_manager(workdir: epath.Path, keep: int, milestones: int = 0) -> Iterator[Manager]:
    """The manager of `workdir/checkpoints`, which saves in the background until its block ends.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints are kept.
      milestones: checkpoints whose step is a multiple of it are kept for ever; 0: none.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    _write_small_arrays_whole()
    with files.path_for_glob(workdir) as place:
        folder = place / FOLDER
        manager: Manager
        mode = ocp.options.AtomicityMode.AUTO
        if buckets.is_bucket(folder):
            mode = ocp.options.AtomicityMode.COMMIT_FILE
            bucket_arrays.teach_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=milestones or None,
            enable_async_checkpointing=True,
            create=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=lambda: _seal_unfinished(manager)
            ),
            atomicity_options=ocp.options.AtomicityOptions(mode=mode),
        )
        with Manager(folder, options=options) as manager:
            yield manager


def _write_small_arrays_whole() -> None:
    """Lets the devices that hold the same array share the work of writing it only if it is large.

    Orbax cuts every such array into a slice for each device, also one of a few bytes: on 8 devices
    a tiny state is written in half the time without.
    """
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    handler._min_slice_bytes_for_replica_parallel = SMALLEST_SLICE


def save(
    manager: Manager,
    state: Tree,
    record: dict[str, Any],
    first: Callable[[], None] = lambda: None,
) -> None:
    """Starts saving the state under its step; a step that is already there is left alone.

    Args:
      manager: from `open_manager`.
      state: has a field `step`.
      record: JSON-like; shapes and checksums are added.
      first: writes what must be there before the checkpoint is.

    Raises:
      OSError: where the disk is full, or a bucket failed `MOST_FAILURES` times in a row; the last
        committed checkpoint is still good.
    """
    step = int(state.step)
    with explain_full_disk(manager):
        settle(manager)
        if step in manager.all_steps():
            return
        record = {**record, "shapes": _shapes(state), "checksums": integrity.checksums(state)}
        record["sha256"] = integrity.digest(record)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        with _counting_failures(manager):
            manager.started = step
            first()
            manager.save(step, args=arguments)


def wait(manager: Manager) -> None:
    """Blocks until the last save is committed; raises OSError where it is not."""
    with explain_full_disk(manager):
        settle(manager)
    if manager.failures:
        raise OSError(
            f"the last checkpoint could not be written to {workdir_of(manager) / FOLDER}; "
            f"{_kept(manager)}; run the same command again"
        )


def settle(manager: Manager) -> None:
    """Waits for the save before, and notes the newest checkpoint.

    Raises:
      OSError: as `save`.
    """
    with _counting_failures(manager):
        manager.wait_until_finished()
        step = manager.latest_step()
        if step is not None:
            note_newest(workdir_of(manager), step)
        if step == manager.started:
            manager.failures = 0


@contextlib.contextmanager
def _counting_failures(manager: Manager) -> Iterator[None]:
    """In a bucket, turns an error of any process into a line, up to `MOST_FAILURES` in a row."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not buckets.is_bucket(manager.directory):
            raise
        failure = error
    if not buckets.is_bucket(manager.directory):
        return
    said = agreement.gather(failure and buckets.one_sentence(failure))
    first = next(filter(None, said), None)
    if first is None:
        return
    with contextlib.suppress(Exception):  # the bucket may still be away
        manager.reload()
    manager.failures += 1
    if manager.failures >= MOST_FAILURES:
        raise OSError(
            f"{MOST_FAILURES} checkpoints in a row could not be written to {manager.directory} "
            f"({first}); {_kept(manager)}; put right what hinders it and run the same command again"
        ) from failure
    console.report(
        f"A checkpoint could not be written ({first}); the run goes on, {_kept(manager)}"
    )


def _kept(manager: Manager) -> str:
    step = manager.latest_step()
    return "no checkpoint is complete yet" if step is None else f"that of step {step} is safe"


def restore_newest(manager: Manager, target: Tree) -> tuple[Tree, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its record; None where there is none at all.

    The first process chooses, and all read what it has chosen. A damaged checkpoint is renamed
    `<step>.damaged` by the first process, and the one before it is tried. Where a checkpoint is not
    damaged and cannot be read all the same, nothing is renamed.

    Args:
      manager: from `open_manager`.
      target: the state as jax.ShapeDtypeStruct leaves with the shardings wanted.

    Raises:
      ValueError: where a good checkpoint holds another architecture, where processes read different
        checkpoints, or (NoneWhole) where every checkpoint is damaged.
      OSError, RuntimeError, MemoryError: where a checkpoint cannot be read now.
    """
    damaged: list[str] = []
    while (step := agreement.from_first(functools.partial(_newest_step, manager))) is not None:
        folder = workdir_of(manager) / FOLDER / str(step)
        try:
            restored = _restore(folder, target)
            _agree_on_steps(manager)
            return restored
        except integrity.Damaged as error:
            set_aside = functools.partial(_set_aside, folder, error)
            damaged.append(agreement.from_first(set_aside))
            manager.reload()
    if damaged:
        raise NoneWhole(
            f"a run resumes from a checkpoint that is whole; got none in {workdir_of(manager)}, "
            f"they are kept as {', '.join(damaged)}; put a good one back, or pass "
            "--config.on_mismatch=restart to start from step 0"
        )
    return None


def lost_work(workdir: epath.Path) -> str:
    """What shows that a workdir without a checkpoint had got further than step 0; '' for nothing.

    Lines of metrics alone show it only where no file says that no checkpoint was committed yet: a
    run may end before its first one.
    """
    damaged = sorted(n for n in files.names_in(workdir / FOLDER) if ".damaged" in n)
    if damaged:
        return f"{', '.join(damaged)} in {workdir / FOLDER}"
    noted = workdir / NEWEST
    if noted.exists():
        step = json.loads(noted.read_text())["step"]
        return f"{noted}, by which step {step} was saved" if step is not None else ""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return f"{metrics} with {len(lines)} lines of later steps" if lines else ""


def note_newest(workdir: epath.Path, step: int | None) -> None:
    """Notes the newest committed step, or None at the start of a run, for `lost_work`."""
    if jax.process_index() == 0:
        files.write_json(workdir / NEWEST, {"step": step})


def _restore(folder: epath.Path, target: Tree) -> tuple[Tree, dict[str, Any]]:
    """The state and record of one checkpoint, the same on all processes; Damaged where it is."""
    state, record, failure = None, {}, None
    try:
        record = read_record(folder)
    except Exception as error:
        failure = error
    _agree(folder, failure)
    agreement.require_equal("checkpoint", {str(folder): integrity.digest(record)})
    _check_shapes(record["shapes"], _shapes(target), folder)
    try:
        # Not through the manager: there a process whose reading fails leaves the others waiting.
        arguments = ocp.args.StandardRestore(target)
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            state = handler.restore(files.absolute(folder / "state"), args=arguments)
    except Exception as error:
        failure = error
    _agree(folder, failure)
    try:
        integrity.check_sums(state, record["checksums"])
    except integrity.Damaged as error:
        # Damaged, unless it cannot be read now.
        agreement.from_first(functools.partial(integrity.hashes, folder))
        raise error
    if jax.process_index() == 0 and not (folder / integrity.SEAL).exists():
        with contextlib.suppress(OSError):  # of a file system that is read only, say
            integrity.seal(folder)
    return state, record


def _agree(folder: epath.Path, failure: Exception | None) -> None:
    """Raises on every process where reading failed on one: Damaged where the files are.

    Raises:
      Damaged: where the first process finds other bytes than those that were saved.
      OSError, RuntimeError, MemoryError: otherwise.
    """
    said = agreement.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    first = next((text for text in said if text is not None), None)
    if first is None:
        return
    try:
        reason = agreement.from_first(lambda: _damage(folder, failure))
    except OSError:
        reason = ""
    if reason:
        raise integrity.Damaged(reason) from failure
    if isinstance(failure, RuntimeError | MemoryError):
        raise failure
    where = f" on process {said.index(first)}" if len(said) > 1 else ""
    raise OSError(
        f"a checkpoint must be readable; got {' '.join(first.split())[:300]}{where}; {folder} is "
        "as it was, nothing is renamed: put right what hinders reading and run the same command "
        "again"
    ) from failure


def _damage(folder: epath.Path, failure: Exception | None) -> str:
    """What of a checkpoint's files is not as it was saved; '' where they are whole.

    Raises:
      OSError: where they cannot be read.
    """
    found = integrity.hashes(folder)
    sealed = integrity.read_seal(folder)
    if sealed is None:
        reason = f"{type(failure).__name__}: {failure}" if failure else ""
        return "" if failure is None or _is_environmental(failure) else reason
    changed = integrity.changed(found, sealed)
    if not changed:
        return ""
    name = changed[0]
    what = "differs from its sha256" if name in found else "is missing"
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{name} {what}{more}"


def _is_environmental(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, comes from the system and not from what was read."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError | RuntimeError | MemoryError):
            return True
        if any(word in str(error) for word in _SYSTEM_WORDS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


# How TensorStore and absl say what the operating system told them.
_SYSTEM_WORDS = (
    "[OS error",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "[Errno",
)


def _seal_unfinished(manager: Manager) -> None:
    """Seals the checkpoint that is being written, before Orbax commits it.

    On a disk it has a name of its own until then.
    """
    folder = manager.directory
    if buckets.is_bucket(folder):
        integrity.seal(folder / str(manager.started))
        return
    for name in files.names_in(folder):
        if ".orbax-checkpoint-tmp" in name:
            integrity.seal(folder / name)


def load_fields(folder: epath.Path, fields: tuple[str, ...]) -> tuple[Tree, dict[str, Any]]:
    """Some fields of the state of one checkpoint, as numpy arrays.

    Args:
      folder: `workdir/checkpoints/<step>`.
      fields: names of fields or of parts of them, such as 'ema' or 'params/disc_heads'.

    Returns:
      ({field: nested dict of arrays}, record).

    Raises:
      ValueError: where the checkpoint is damaged.
    """
    record = read_record(folder)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {
        name: jax.ShapeDtypeStruct(shape, untrusted.dtype(dtype), sharding=place)
        for name, (shape, dtype) in record["shapes"].items()
        if any(f"{name}/".startswith(f"{field}/") for field in fields)
    }
    target = traverse_util.unflatten_dict(flat, sep="/")
    arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.restore(files.absolute(folder / "state"), args=arguments)
    integrity.check_sums(tree, {name: record["checksums"][name] for name in flat})
    return jax.device_get(tree), record


def newest(workdir: epath.Path) -> epath.Path | None:
    """The folder of the newest committed checkpoint of a workdir."""
    folder = workdir / FOLDER
    steps = sorted((int(name) for name in files.names_in(folder) if name.isdigit()), reverse=True)
    return next((folder / str(step) for step in steps if _is_committed(folder / str(step))), None)


def _is_committed(folder: epath.Path) -> bool:
    return not buckets.is_bucket(folder) or (folder / integrity.COMMIT).exists()


def read_record(folder: epath.Path) -> dict[str, Any]:
    """The record of one checkpoint.

    Args:
      folder: `workdir/checkpoints/<step>`.

    Raises:
      Damaged: where it is not as it was saved.
      OSError: where it cannot be read.
    """
    with buckets.as_oserror(folder):
        text = (folder / "record" / "metadata").read_bytes()
    try:
        record = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise integrity.Damaged("the record is no JSON") from error
    if record.pop("sha256", None) != integrity.digest(record):
        raise integrity.Damaged("the record differs from its sha256")
    return record


@contextlib.contextmanager
def explain_full_disk(manager: Manager) -> Iterator[None]:
    """Turns the many ways in which a full disk shows up into one sentence, an OSError."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the other writers' tracebacks
        raise OSError(
            f"the disk of {workdir_of(manager) / FOLDER} is full; {_kept(manager)}; free some "
            "space and run the same command again"
        ) from error


def _shapes(tree: Tree) -> dict[str, list[Any]]:
    leaves = jax.tree.leaves(tree)
    return {
        name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
        for name, leaf in zip(integrity.names(tree), leaves, strict=True)
    }


def _check_shapes(saved: dict[str, Any], wanted: dict[str, Any], path: Any) -> None:
    names = sorted({*saved, *wanted})
    wrong = [n for n in names if saved.get(n) != wanted.get(n)]
    if wrong == ["key"]:
        made_by = KEY_SIZES.get(saved["key"][0][-1], "another one")
        raise ValueError(
            f"a run keeps its random number generator; got {path} of {made_by}, where this process "
            f"uses {jax.random.key_impl(jax.random.key(0))}; set JAX_DEFAULT_PRNG_IMPL={made_by}"
        )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"a checkpoint has the arrays of the config that resumes it; got {path} with another "
            f"architecture: {len(wrong)} arrays differ, first {name} ({saved.get(name)} in the "
            f"checkpoint, {wanted.get(name)} in this config); use the config that made it or "
            "another --workdir"
        )


def _set_aside(folder: epath.Path, error: Exception) -> str:
    """Renames a damaged checkpoint, says so, and returns its new name."""
    aside = folder.with_name(f"{folder.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    if buckets.is_bucket(folder):
        buckets.move(folder, aside)
    else:
        folder.rename(aside)
    reason = " ".join(str(error).split())[:200]
    console.report(
        f"The checkpoint of step {folder.name} is damaged ({reason}); it is kept as {aside}."
    )
    return aside.name


def _agree_on_steps(manager: Manager, tries: int = 10) -> None:
    """Waits until all processes see the same checkpoints: Orbax decides by them what to save."""
    for left in reversed(range(tries)):
        manager.reload()
        steps = agreement.gather(sorted(manager.all_steps()))
        if all(each == steps[0] for each in steps):
            return
        if left:
            time.sleep(1.0)
    agreement.require_equal("checkpoints", {"steps": sorted(manager.all_steps())})


def _newest_step(manager: Manager) -> int | None:
    """The newest step that Orbax takes for committed, or on a disk that has a seal."""
    manager.reload()
    folder, sealed = manager.directory, []
    if not buckets.is_bucket(folder):
        steps = filter(str.isdigit, files.names_in(folder))
        sealed = [int(name) for name in steps if (folder / name / integrity.SEAL).exists()]
    return max([*manager.all_steps(), *sealed], default=None)


def workdir_of(manager: Manager) -> epath.Path:
    """The workdir whose checkpoints a manager keeps, by its own name."""
    folder = manager.directory.parent
    return epath.Path(os.path.realpath(folder)) if os.path.islink(folder) else folder
