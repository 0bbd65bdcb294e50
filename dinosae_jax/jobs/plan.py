"""Compiles a training step ahead of time for devices that need not be present: does it fit?

Everything is traced from shapes: no parameter is allocated. Prints the row and writes `plan.json`;
with `ledger` it also enters the row into a ledger file and its Markdown table.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from typing import Any

import jax
import ml_collections
from etils import epath

from dinosae_jax import encoders, names
from dinosae_jax.perf import collectives, dtypes, hlo, prediction, programs, targets
from dinosae_jax.runtime import console, files, hardware, sharding
from dinosae_jax.train import step_flops

Row = dict[str, Any]
LARGEST_SHARE = 0.9  # of the device's memory
GIB = 2**30
KEY = ["step", "target", "fsdp"]  # first columns of all tables of the ledger
VERDICT = [*KEY, "batch", "remat, micro-batches", "peak", "fits"]
TIMES = [*KEY, "batch", "remat, micro-batches", "predicted", "of peak", "without kernels"]
TIMES += ["at least", *prediction.KINDS]
COSTS = [*KEY, "TFLOP", "state", "aliased", "frozen", "temporaries", "collectives"]
COSTS += ["largest copies", "CPU s to compile"]


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Plans `stages.<chain[0]>` on `target`.

    Args:
      config: target, ledger, chain, stages (configs/plan.py).
      folder: where plan.json goes.

    Raises:
      ValueError: for an unknown target, a missing compiler, or a batch that does not divide.
    """
    devices = targets.devices_of(config.target)
    for name in config.chain:
        row = plan(name, config.stages[name], config.target, devices, config.effort, config.top)
        console.report(describe(row))
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "plan.json", row)
        if config.ledger:
            row.pop("costliest", None)
            enter(files.path(config.ledger), {**row, "command": command()})


def plan(
    name: str,
    config: ml_collections.ConfigDict,
    target: str,
    devices: list[Any],
    effort: names.Effort,
    top: int = 0,
) -> Row:
    """Compiles one training step and reads memory, collectives, time and replication off it.

    Args:
      name: name of the row.
      config: config of the stage.
      target: name of the target, for the row.
      devices: the target's devices.
      effort: effort of the compiler, one of `names.Effort`.
      top: how many of the costliest instructions are listed.

    Returns:
      The row of the ledger; memory, collectives and FLOPs are those of one device. A program that
      needs more memory than the compiler allows has `fits` False and the compiler's message in
      `refused`.
    """
    config = config.copy_and_resolve_references()
    if config.dtype == "auto":
        config.dtype = "float32" if target.startswith("cpu") else "bfloat16"
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    program: programs.Program | programs.Sampler
    state: Any
    if config.get("samples"):  # the sampler of a flow, not its training step
        program, image_flops = programs.build_sampler(config, mesh), programs.sampler_flops(config)
        state, frozen = {}, program.arguments[0]
    else:
        program, image_flops = programs.build(config, mesh), step_flops.train_flops(config)
        state, frozen = program.arguments[:2]
    flops = image_flops * config.batch_size // len(devices)
    known = hardware.find(devices[0])
    row = {
        "name": name,
        "target": target,
        "devices": len(devices),
        "fsdp": config.mesh.fsdp,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "flops": flops,
        "state_bytes": device_bytes(state),
        "frozen_bytes": device_bytes(frozen),
        "replicated": {"state": replicated(state), "frozen": replicated(frozen)},
        "memory_bytes": int(known.memory_gib * GIB) if known else None,
        "ms_at_peak": 1e3 * flops / (known.peak_tflops * 1e12) if known else None,
        "jax": jax.__version__,
        "effort": effort,
    }
    started, cpu_started = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        lowered = program.step.lower(*program.arguments)
    try:
        compiled = lowered.compile(targets.compiler_options(target, effort))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**row, "fits": False, "refused": str(error).splitlines()[0]}
    memory = programs.memory(compiled)
    room = row["memory_bytes"]
    module = hlo.parse(compiled.as_text())
    uses = collectives.uses(module)
    return {
        **row,
        **{f"{part}_bytes": size for part, size in memory.items()},
        **dtypes.record(module),
        **predicted(module, target, flops, known, top),
        "collectives": {kind: dataclasses.asdict(use) for kind, use in uses.items()},
        "fits": memory["peak"] <= LARGEST_SHARE * room if room else None,
        "compile_seconds": round(time.perf_counter() - started, 1),
        "compile_cpu_seconds": round(time.process_time() - cpu_started, 1),
    }


def predicted(
    module: hlo.Module, target: str, flops: int, known: hardware.Hardware | None, top: int
) -> Row:
    """The predicted time in a row: milliseconds, MFU; loops and costliest lines on request."""
    found = prediction.predict(module, target)
    if found is None or known is None:
        return {}
    lines = [*prediction.describe_loops(found), *prediction.describe(found.costliest(top))]
    costliest = {"costliest": lines} if top else {}
    return prediction.record(found, flops, 1e12 * known.peak_tflops) | costliest


def device_bytes(tree: Any) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(tree: Any) -> dict[str, Any]:
    """Replicated leaves: path and bytes of the largest, and bytes of all."""
    copies = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated
    }
    path = max(copies, key=lambda name: copies[name], default="")
    return {"path": path, "bytes": copies.get(path, 0), "all_bytes": sum(copies.values())}


def describe(row: Row) -> str:
    """The row as printed lines."""
    copies = row["replicated"]
    lines = [
        f"{row['name']} on {row['target']}: {row['devices']} devices, fsdp {row['fsdp']}, batch "
        f"{row['batch_size']}, {row['dtype']}",
        f"  FLOPs per step, device   {row['flops'] / 1e12:.4g} T"
        + (f", {row['ms_at_peak']:.3g} ms at peak" if row["ms_at_peak"] else ""),
        f"  state, frozen networks   {_gib(row['state_bytes'])}, {_gib(row['frozen_bytes'])}",
        *(
            f"  largest copy, {part:<10} {copy['path']}, {_gib(copy['bytes'])} "
            f"(all copies: {_gib(copy['all_bytes'])})"
            for part, copy in copies.items()
            if copy["path"]
        ),
    ]
    if "refused" in row:
        return "\n".join([*lines, f"  does not fit: {row['refused']}"])
    lines.append(
        f"  peak memory per device   {_gib(row['peak_bytes'])} (arguments "
        f"{_gib(row['arguments_bytes'])}, temporaries {_gib(row['temporaries_bytes'])}, aliased "
        f"{_gib(row['aliased_bytes'])})"
    )
    for kind, use in row["collectives"].items():
        lines.append(f"  {kind:<24} {use['runs']} per step, {_gib(use['bytes'])}")
    sums = ", ".join(f"{count} in {dtype}" for dtype, count in row["long_sums"].items())
    lines.append(f"  sums of {dtypes.LONG} or more     {sums or 'none'}")
    room = row["memory_bytes"]
    if room:
        verdict = "fits" if row["fits"] else "does not fit"
        lines.append(f"  {verdict}: {row['peak_bytes'] / room:.0%} of {_gib(room)}")
    return "\n".join(lines + describe_prediction(row))


def describe_prediction(row: Row) -> list[str]:
    """The predicted time of a row as printed lines."""
    if "predicted_ms" not in row:
        return []
    total, bare = row["predicted_ms"], row["predicted_ms_without_kernels"]
    kernels = f", {bare:.4g} ms without kernels" if bare < total else ""
    silent = row["silent_kernels"]
    lines = [
        f"  predicted                {total:.4g} ms, {row['predicted_mfu']:.1%} of peak{kernels}; "
        f"at least {row['predicted_ms_at_least']:.4g} ms",
        *([f"    {silent} kernels state no FLOPs, count by their arrays"] if silent else []),
        *(
            f"    {kind:<22} {ms:.4g} ms, {ms / total:.1%}"
            for kind, ms in row["predicted_ms_by_kind"].items()
            if ms
        ),
    ]
    return lines + [f"    {line}" for line in row.get("costliest", ())]


def command() -> str:
    """The command line of this process without the flags that change nothing of a row."""
    kept = [a for a in sys.argv[1:] if not re.match(r"--(workdir|config\.(ledger|top))", a)]
    return " ".join(["python -m dinosae_jax.main", *kept])


def enter(path: epath.Path, row: Row) -> None:
    """Puts a row into the ledger in place of an earlier one of the same command.

    Args:
      path: the JSON file; a Markdown table of the same name is written next to it.
      row: a row with 'command'.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if old["command"] != row["command"]] + [row]
    rows.sort(key=lambda r: (r["name"], r["target"], r["command"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, rows)
    rows = json.loads(path.read_text())  # the page says what the file says, in its order
    files.write_text(path.with_suffix(".md"), table(rows))


def table(rows: list[Row]) -> str:
    """The ledger as a Markdown page: does it fit, how fast is it, and why."""
    lines = [
        "# Ledger of planned steps",
        "",
        "Made by `docs/ledger.sh` (`configs/plan.py`): compiled ahead of time by the compilers of "
        "the targets (libtpu; XLA:GPU), without the hardware and at least effort (`effort` in "
        "`ledger.json`: O0, or -1 in rows made on the scale before it). Nothing here was run. "
        "Bytes are those of one device. The command of each row is in `ledger.json`; a `cut` row "
        "has two layers of each transformer. Frozen networks, and the sampler's weights, are "
        "copies on every device by design.",
        "",
        *_markdown(VERDICT),
        *(_line(row, fits(row)) for row in rows),
        "",
        "Predicted milliseconds of a step, of one device (`perf/prediction.py` says how, and what "
        "is left out: overlap, launches, links between hosts). On TPU they are the compiler's own "
        "estimate, on GPU a roofline; kernels written by hand count by their own FLOPs and bytes "
        "at a stated share of the peak. `of peak` is MFU; `at least` is the same instructions at "
        "the peak and at full bandwidth. A run compiles at effort `default`.",
        "",
        *_markdown(TIMES),
        *(_line(row, times(row)) for row in rows if "predicted_ms" in row),
        "",
        "Collectives are executions per step and the bytes they deliver. Largest copies are of the "
        "trained state and of the frozen networks.",
        "",
        *_markdown(COSTS),
    ]
    for row in rows:
        uses = row.get("collectives", {})
        lines.append(
            _line(
                row,
                [
                    f"{row['flops'] / 1e12:.4g}",
                    _gib(row["state_bytes"]),
                    _gib(row["aliased_bytes"]) if "aliased_bytes" in row else "-",
                    _gib(row["frozen_bytes"]),
                    _gib(row["temporaries_bytes"]) if "temporaries_bytes" in row else "-",
                    ", ".join(f"{u['runs']} {k} {_gib(u['bytes'])}" for k, u in uses.items()),
                    _copies(row["replicated"]),
                    str(row.get("compile_cpu_seconds", "-")),
                ],
            )
        )
    return "\n".join(lines) + "\n"


def fits(row: Row) -> list[str]:
    """Cells of a row's verdict: batch, remat and micro-batches, peak, whether it fits."""
    verdict = {True: "yes", False: "no", None: "-"}[row["fits"]]
    peak = "out of memory"
    if "peak_bytes" in row:
        peak = _gib(row["peak_bytes"])
        if room := row["memory_bytes"]:
            peak += f" of {_gib(room)}"
    return [*_settings(row), peak, verdict]


def times(row: Row) -> list[str]:
    """Cells of a row's predicted time: batch, remat and micro-batches, sums, kinds."""
    sums = (row["predicted_ms_without_kernels"], row["predicted_ms_at_least"])
    kinds = row["predicted_ms_by_kind"]
    return [
        *_settings(row),
        f"{row['predicted_ms']:.4g} ms",
        f"{row['predicted_mfu']:.1%}",
        *(f"{ms:.4g}" for ms in sums),
        *(f"{kinds[kind]:.4g}" for kind in prediction.KINDS),
    ]


def _settings(row: Row) -> list[str]:
    """Cells of the batch, and of remat, micro-batches and effort where a command sets them."""
    flags = dict(re.findall(r"(remat|accumulation|config\.effort)=(\w+)", row["command"]))
    how = ", ".join(flags[name] for name in ("remat", "accumulation") if name in flags)
    effort = f", effort {flags['config.effort']}" if "config.effort" in flags else ""
    return [str(row["batch_size"]), (how or "default") + effort]


def _markdown(head: list[str]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def _line(row: Row, cells: list[str]) -> str:
    words = re.split(r"[:, ]", row["command"])
    marks = [word for word in words if word == "cut" or word in encoders.NETWORKS]
    name = row["name"] + (f" ({', '.join(marks)})" if marks else "")
    return f"| {' | '.join([name, row['target'], str(row['fsdp']), *cells])} |"


def _copies(replicated: dict[str, Any]) -> str:
    return "; ".join(
        f"{part} {_gib(copy['bytes'])} ({copy['path'].split('/params/')[-1]})"
        for part, copy in replicated.items()
        if copy["path"]
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"
