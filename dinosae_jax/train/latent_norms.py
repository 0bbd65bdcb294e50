"""The norms of latent tokens, whose mean is the decode radius."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax import encoders
from dinosae_jax.data import loading
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.models import autoencoder
from dinosae_jax.names import ENCODER_ROLES
from dinosae_jax.runtime import agreement, console, files, sharding, stopping
from dinosae_jax.train import flow_step
from dinosae_jax.weights import integrity

MEASURED_IMAGES = 10_000
NORMS_FILE = "latents.json"
PARTIAL_FILE = "latents.partial.npz"  # what is measured so far, by image
SAVE_EVERY = 30.0  # seconds
IMAGE_FIELDS = ("image_size", "crop", "resize", "flip")

Rows = NDArray[np.float32]  # [images, 2]: mean norm and mean squared norm of an image's tokens
_NONE: Rows = np.zeros((0, 2), np.float32)


def identity(record: dict[str, Any]) -> str:
    """A sha256 of what the norms depend on: encoder, images, crops and seed of a flow's record."""
    config = record["config"]
    return integrity.digest(
        {
            "encoder": [record["frozen"][role] for role in ENCODER_ROLES],
            "data": record["data"],
            "images": {field: config["data"][field] for field in IMAGE_FIELDS},
            "seed": config["seed"],
            **({"reading": reading} if (reading := encoders.reading(config["model"])) else {}),
        }
    )


def token_norms(
    config: ml_collections.ConfigDict,
    spec: flow_step.StepSpec,
    frozen: flow_step.Variables,
    source: loading.Source,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    of: str,
) -> dict[str, Any]:
    """Mean and standard deviation of the norms of the latent tokens, measured once per workdir.

    Measures training crops of up to `MEASURED_IMAGES` images in the order of training, a small set
    about once. A latent cache has the norms of all its tokens in its manifest. What an interrupted
    run has measured is kept.

    Args:
      config: data, eval.batch_size, seed, name.
      spec: static.
      frozen: roles stem and vit, on the devices.
      source: of the training images.
      workdir: gets `NORMS_FILE`.
      mesh: the devices.
      of: `identity` of what is measured; norms of something else are measured again.

    Returns:
      mean, deviation, images or tokens, and `of`; for a cache, its manifest's.

    Raises:
      stopping.Interrupted: after a signal.
    """
    if isinstance(source, latent_reader.LatentSource):
        return source.manifest["norms"]
    known = agreement.from_first(lambda: _read_norms(workdir, of))
    if known:
        return known
    size, count = batches_of(config, source, mesh)
    of_rows = f"{of} {size}"
    found = _read_partial(workdir, of_rows) if jax.process_index() == 0 else _NONE
    done = agreement.from_first(lambda: len(found)) // size
    rows = _measure(
        _moments(spec, frozen, mesh),
        measured_batches(config, source, mesh, "token norms", done),
        found,
        lambda rows: _write_partial(workdir, of_rows, rows),
        config.name,
    )
    mean, square = rows.astype(np.float64).mean(axis=0)
    deviation = float(np.sqrt(max(square - mean**2, 0.0)))
    norms = {"mean": float(mean), "deviation": deviation, "images": count * size, "of": of}
    if jax.process_index() == 0:
        files.write_json(workdir / NORMS_FILE, norms)
        (workdir / PARTIAL_FILE).unlink(missing_ok=True)
    return agreement.from_first(lambda: norms)  # the first process has what was kept


def batches_of(
    config: ml_collections.ConfigDict, source: loading.Source, mesh: jax.sharding.Mesh
) -> tuple[int, int]:
    """Size and number of the batches that are measured."""
    size = sharding.device_multiple(config.eval.batch_size, mesh)
    return size, -(-min(MEASURED_IMAGES, len(source)) // size)


def measured_batches(
    config: ml_collections.ConfigDict,
    source: loading.Source,
    mesh: jax.sharding.Mesh,
    what: str,
    done: int = 0,
) -> loading.Batches:
    """The batches that are measured, in the order of training, with progress, behind `done`."""
    size, count = batches_of(config, source, mesh)
    batches = loading.training_batches(source, config, mesh, ("image",), size, done)
    left = (batch for _, batch in zip(range(done, count), batches, strict=False))
    return console.progress(f"{config.name}: measures {what}", left, (count - done) * size, size)


def _moments(
    spec: flow_step.StepSpec, frozen: flow_step.Variables, mesh: jax.sharding.Mesh
) -> Callable[[dict[str, np.ndarray]], Rows]:
    """Batch -> mean norm and mean squared norm of each image's tokens, [b, 2]."""

    @jax.jit
    def moments(frozen: Any, image: jax.Array) -> jax.Array:
        scaled = autoencoder.unit_interval(image)
        norms = jnp.linalg.norm(autoencoder.encode(spec.modules, frozen, scaled).tokens, axis=-1)
        return jnp.stack([jnp.mean(norms, axis=-1), jnp.mean(norms**2, axis=-1)], axis=-1)

    return lambda batch: sharding.gather(moments(frozen, sharding.put_batch(batch, mesh)["image"]))


def _measure(
    moments: Callable[[dict[str, np.ndarray]], Rows],
    batches: loading.Batches,
    found: Rows,
    keep: Callable[[list[Rows]], None],
    name: str,
) -> Rows:
    """`moments` of all batches behind what was found before; kept now and then, and at a signal."""
    rows, saved = [found], time.monotonic()
    try:
        for batch in batches:
            stopping.check(f"{name}, while it measured token norms,")
            rows.append(moments(batch))
            if time.monotonic() - saved > SAVE_EVERY:
                keep(rows)
                saved = time.monotonic()
    except stopping.Interrupted:
        keep(rows)
        raise
    return np.concatenate(rows)


def _read_norms(workdir: epath.Path, of: str) -> dict[str, Any] | None:
    path = workdir / NORMS_FILE
    norms = json.loads(path.read_text()) if path.exists() else None
    return norms if norms and norms.get("of", of) == of else None  # older files do not say


def _read_partial(workdir: epath.Path, of: str) -> Rows:
    path = workdir / PARTIAL_FILE
    if path.exists():
        with path.open("rb") as opened, np.load(opened) as file:
            if str(file["of"]) == of:
                return file["rows"]
    return _NONE


def _write_partial(workdir: epath.Path, of: str, rows: list[Rows]) -> None:
    if jax.process_index() == 0:
        with files.publishing(workdir / PARTIAL_FILE) as partial:
            np.savez(partial, of=of, rows=np.concatenate(rows))  # type: ignore[arg-type]
