"""Speed and memory of training steps, and the speed of data loading and of metrics.

Prints one line per row and writes `bench.json`: {'machine', 'steps', 'overhead', 'loader',
'metrics', 'latents', 'flow', 'encoders'}; the last three are reading of the latent cache, encoding
and sampling, and the published encoders. Steps run on synthetic batches with random parameters.
After the warm-up, groups of steps are timed as the training loop runs them (the host waits at the
end of a group); the result is the median group's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.eval import frechet, precision_recall
from dinosae_jax.eval.recipe import Recipe
from dinosae_jax.perf import flow_speed, loader_speed, overhead, step_speed
from dinosae_jax.runtime import console, files, hardware


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Measures the steps in `chain`, a run's overhead, data loading, sampling and metrics.

    Args:
      config: chain, stages, batch_per_device, warmup, repeats, steps, overhead, loader, metrics,
        latents, flow, encoders (configs/bench.py).
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
        result["steps"][name] = row = step_speed.measure_step(config, name)
        console.report(step_speed.describe(name, row))
    if config.overhead.repeats:
        result["overhead"] = cost = measure_run(config.overhead, folder / "overhead")
        console.report(
            f"loader, lines, EMA and checkpoints: {cost['overhead']:.2%} of a step of "
            f"{cost['step_seconds']:.3f} s"
        )
    for name, measure in loader_speed.LOADERS.items():
        result["loader"][name] = speed = measure(config.loader)
        console.report(f"{name}: {speed:.0f} images/s")
    for name, compute in METRICS.items():
        result["metrics"][name] = seconds = measure_metric(compute, config.metrics)
        console.report(f"{name}: {seconds['wall']:.1f} s, {seconds['cpu']:.1f} s of all cores")
    result["latents"] = flow_speed.measure_latents(config.latents)
    result["flow"] = flow_speed.measure_flow(config)
    result["encoders"] = flow_speed.measure_encoders(config)
    result["process_peak_memory_bytes"] = hardware.peak_memory()
    if jax.process_index() == 0:
        files.write_json(folder / "bench.json", result)


def measure_run(config: ml_collections.ConfigDict, folder: epath.Path) -> dict[str, float]:
    """Runs `overhead.measure_overhead`, on synthetic JPEGs where the stage names no source."""
    if not config.stage.data.source:
        images_folder = loader_speed.write_jpegs(folder.parent / "jpegs", config.jpegs)
        config = config.copy_and_resolve_references()
        config.stage.data.source = f"folder:{images_folder}"
    return overhead.measure_overhead(config, folder)


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
