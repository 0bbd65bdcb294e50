"""Speed and memory of training steps, and the speed of data loading and of metrics.

Prints one line per row and writes `bench.json`: {'machine', 'steps', 'overhead', 'loader',
'metrics', 'latents', 'flow'}; the last two are reading of the latent cache, and encoding and
sampling. Steps run on synthetic batches with random parameters. After the warm-up, groups of steps
are timed as the training loop runs them (the host waits at the end of a group); the result is the
median group's.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from dinosae_jax.data import crops, images
from dinosae_jax.eval import frechet, precision_recall
from dinosae_jax.eval.recipe import Recipe
from dinosae_jax.perf import flow_speed, overhead, programs
from dinosae_jax.runtime import console, files, hardware, jit, precision, sharding
from dinosae_jax.train import step_flops

JPEG_SIZE = (500, 375)  # width and height of a typical ImageNet photograph


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Measures the steps in `chain`, a run's overhead, data loading, sampling and metrics.

    Args:
      config: chain, stages, batch_per_device, warmup, repeats, steps, overhead, loader, metrics,
        latents, flow (configs/bench.py).
      folder: where bench.json goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()
    machine = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    console.report(f"{machine['devices']} x {machine['device']}, jax {machine['jax']}")
    result: dict[str, Any] = {"machine": machine, "steps": {}, "loader": {}, "metrics": {}}
    for name in config.chain:
        result["steps"][name] = row = measure_step(config, name)
        console.report(describe(name, row))
    if config.overhead.repeats:
        result["overhead"] = cost = measure_run(config.overhead, folder / "overhead")
        console.report(
            f"loader, lines, EMA and checkpoints: {cost['overhead']:.2%} of a step of "
            f"{cost['step_seconds']:.3f} s"
        )
    for name, measure in LOADERS.items():
        result["loader"][name] = speed = measure(config.loader)
        console.report(f"{name}: {speed:.0f} images/s")
    for name, compute in METRICS.items():
        result["metrics"][name] = seconds = measure_metric(compute, config.metrics)
        console.report(f"{name}: {seconds['wall']:.1f} s, {seconds['cpu']:.1f} s of all cores")
    result["latents"] = flow_speed.measure_latents(config.latents)
    result["flow"] = flow_speed.measure_flow(config)
    result["process_peak_memory_bytes"] = hardware.peak_memory()
    if jax.process_index() == 0:
        files.write_json(folder / "bench.json", result)


def measure_step(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
    """Compiles and times one training step.

    Args:
      config: see `run`.
      name: name of the stage and of the row.

    Returns:
      batch_size, ms_per_step, images_per_second, peak_memory_bytes (per device, the compiler's
      plan), compile_seconds, flops_per_image, tflops_per_device and, where the peak of the device
      is known, mfu.
    """
    stage = precision.resolve_config(config.stages[name])
    stage.batch_size = config.batch_per_device[name] * jax.device_count() * stage.accumulation
    mesh = sharding.make_mesh(stage.mesh.fsdp)
    with jax.set_mesh(mesh):
        program = programs.build(stage, mesh)
        started = time.perf_counter()
        compiled = program.step.lower(*program.arguments).compile()
        compile_seconds = time.perf_counter() - started
        seconds = _time(compiled, *_synthetic(program, stage.seed), config)
    rate = stage.batch_size / seconds
    flops = step_flops.train_flops(stage)
    return {
        "batch_size": stage.batch_size,
        "ms_per_step": 1e3 * seconds,
        "images_per_second": rate,
        "peak_memory_bytes": programs.memory(compiled)["peak"],
        "compile_seconds": compile_seconds,
        "flops_per_image": flops,
        **hardware.utilisation(flops, rate, list(mesh.devices.flat)),
    }


def measure_run(config: ml_collections.ConfigDict, folder: epath.Path) -> dict[str, float]:
    """Runs `overhead.measure_overhead`, on synthetic JPEGs where the stage names no source."""
    if not config.stage.data.source:
        images_folder = folder.parent / "jpegs"
        for split in ("train", "val"):
            class_folder = images_folder / split / "one"
            class_folder.mkdir(parents=True, exist_ok=True)
            for number in range(config.jpegs):
                (class_folder / f"{number}.jpg").write_bytes(synthetic_jpeg())
        config = config.copy_and_resolve_references()
        config.stage.data.source = f"folder:{images_folder}"
    return overhead.measure_overhead(config, folder)


def _synthetic(program: programs.Program, seed: int) -> tuple[Any, tuple[Any, ...]]:
    """A random state, and the step's other arguments: frozen roles, batch, hyperparameters."""
    state, frozen, batch, hyperparams = (
        jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in program.arguments
    )
    make = jit.jit_once(program.make, out_shardings=(state, frozen))
    made, fixed = make(jax.random.PRNGKey(seed))
    random = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:  # labels stay below any number of classes
        return random.integers(0, 256 if leaf.ndim > 1 else 2, leaf.shape).astype(leaf.dtype)

    drawn = jax.device_put(jax.tree.map(draw, program.arguments[2]), batch)
    return made, (fixed, drawn, jax.device_put(program.hyperparams(), hyperparams))


def _time(
    compiled: Any, state: Any, others: tuple[Any, ...], config: ml_collections.ConfigDict
) -> float:
    """Seconds per step, the median over groups of `steps`."""
    for _ in range(config.warmup):
        state = compiled(state, *others)
    jax.block_until_ready(state)
    groups = []
    for _ in range(config.repeats):
        started = time.perf_counter()
        for _ in range(config.steps):
            state = compiled(state, *others)
        jax.block_until_ready(state)
        groups.append((time.perf_counter() - started) / config.steps)
    return statistics.median(groups)


def describe(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    used = f", {row['mfu']:.1%} of peak" if "mfu" in row else ""
    return (
        f"{name}: {row['images_per_second']:.1f} images/s, {row['ms_per_step']:.1f} ms/step at "
        f"batch {row['batch_size']}, {row['peak_memory_bytes'] / 2**30:.3f} GiB per device, "
        f"{row['tflops_per_device']:.4g} TFLOP/s per device{used} "
        f"(compiled in {row['compile_seconds']:.1f} s)"
    )


def read_batches(loader: ml_collections.ConfigDict) -> float:
    """Images/s of the training loader with the config's source, crop and threads."""
    source = images.open_images(loader.data, "train")
    batches = images.train_batches(source, loader.data, batch_size=loader.batch_size, seed=0)
    next(batches)
    started = time.perf_counter()
    for _ in range(loader.batches):
        next(batches)
    return loader.batches * loader.batch_size / (time.perf_counter() - started)


def crop_jpegs(loader: ml_collections.ConfigDict) -> float:
    """Images/s of one core that decodes 500x375 JPEGs and cuts ADM's centre crop of 256 pixels."""
    encoded = synthetic_jpeg()
    started = time.process_time()
    for _ in range(loader.jpegs):
        crops.adm_center_crop(crops.decode_rgb(encoded), 256)
    return loader.jpegs / (time.process_time() - started)


def synthetic_jpeg() -> bytes:
    """A JPEG of quality 92 with structure at every scale, about 60 KB."""
    random = np.random.default_rng(0)
    image = np.zeros((JPEG_SIZE[1], JPEG_SIZE[0], 3))
    for cells in (4, 16, 64, 256):
        noise = random.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
        image += np.asarray(layer, np.float64) / cells**0.5
    scaled = 255 * (image - image.min()) / np.ptp(image)
    buffer = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def measure_metric(
    compute: Callable[[np.ndarray, np.ndarray], Any], sizes: ml_collections.ConfigDict
) -> dict[str, float]:
    """Seconds {'wall', 'cpu'} of computing a metric from random features.

    Args:
      compute: (reference [n, d], samples [m, d]) -> its value.
      sizes: reference, samples, features.
    """
    random = np.random.default_rng(0)
    pair = [
        random.standard_normal((count, sizes.features), np.float32)
        for count in (sizes.reference, sizes.samples)
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    compute(*pair)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def frechet_distance(reference: np.ndarray, samples: np.ndarray) -> float:
    """Moments of both sets and their distance."""
    recipe = Recipe("random", "random", "none")
    return frechet.frechet_distance(*(frechet.statistics(x, recipe) for x in (reference, samples)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "Frechet distance": frechet_distance,
    "precision and recall": precision_recall.precision_recall,
}
LOADERS: dict[str, Callable[[ml_collections.ConfigDict], float]] = {
    "photos, training batches": read_batches,
    "500x375 JPEG to ADM's crop, per core": crop_jpegs,
}
