"""The norms of latent tokens, whose mean is the decode radius."""

from __future__ import annotations

import json
import time
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
from dinosae_jax.weights import checkpoint

MEASURED_IMAGES = 10_000
NORMS_FILE = "latents.json"
PARTIAL_FILE = "latents.partial.npz"  # what is measured so far, by image
SAVE_EVERY = 30.0  # seconds
IMAGE_FIELDS = ("image_size", "crop", "resize", "flip")


def identity(record: dict[str, Any]) -> str:
    """A sha256 of what the norms depend on: encoder, images, crops and seed of a flow's record."""
    config = record["config"]
    return checkpoint.digest(
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
    size = sharding.device_multiple(config.eval.batch_size, mesh)
    count = -(-min(MEASURED_IMAGES, len(source)) // size)
    rows = _measure(config, spec, frozen, source, workdir, mesh, f"{of} {size}", size, count)
    mean, square = rows.astype(np.float64).mean(axis=0)
    deviation = float(np.sqrt(max(square - mean**2, 0.0)))
    norms = {"mean": float(mean), "deviation": deviation, "images": count * size, "of": of}
    if jax.process_index() == 0:
        files.write_json(workdir / NORMS_FILE, norms)
        (workdir / PARTIAL_FILE).unlink(missing_ok=True)
    return agreement.from_first(lambda: norms)  # the first process has what was kept


def _measure(
    config: ml_collections.ConfigDict,
    spec: flow_step.StepSpec,
    frozen: flow_step.Variables,
    source: loading.Source,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    of: str,
    size: int,
    count: int,
) -> NDArray[np.float32]:
    """Mean norm and mean squared norm of each image's tokens, [count * size, 2]."""

    @jax.jit
    def moments(frozen: Any, image: jax.Array) -> jax.Array:
        scaled = autoencoder.unit_interval(image)
        norms = jnp.linalg.norm(autoencoder.encode(spec.modules, frozen, scaled).tokens, axis=-1)
        return jnp.stack([jnp.mean(norms, axis=-1), jnp.mean(norms**2, axis=-1)], axis=-1)

    first = jax.process_index() == 0
    found = _read_partial(workdir, of) if first else np.zeros((0, 2), np.float32)
    done = agreement.from_first(lambda: len(found)) // size
    rows, saved = [found], time.monotonic()
    name = f"{config.name}: measures token norms"
    batches = loading.training_batches(source, config, mesh, ("image",), size, done)
    shown = console.progress(name, batches, (count - done) * size, size)
    try:
        for _, batch in zip(range(done, count), shown, strict=False):
            stopping.check(f"{config.name}, while it measured token norms,")
            rows.append(sharding.gather(moments(frozen, sharding.put_batch(batch, mesh)["image"])))
            if time.monotonic() - saved > SAVE_EVERY:
                _write_partial(workdir, of, rows)
                saved = time.monotonic()
    except stopping.Interrupted:
        _write_partial(workdir, of, rows)
        raise
    return np.concatenate(rows)


def _read_norms(workdir: epath.Path, of: str) -> dict[str, Any] | None:
    path = workdir / NORMS_FILE
    norms = json.loads(path.read_text()) if path.exists() else None
    return norms if norms and norms.get("of", of) == of else None  # older files do not say


def _read_partial(workdir: epath.Path, of: str) -> NDArray[np.float32]:
    path = workdir / PARTIAL_FILE
    if path.exists():
        with path.open("rb") as opened, np.load(opened) as file:
            if str(file["of"]) == of:
                return file["rows"]
    return np.zeros((0, 2), np.float32)


def _write_partial(workdir: epath.Path, of: str, rows: list[NDArray[np.float32]]) -> None:
    if jax.process_index() == 0:
        with files.publishing(workdir / PARTIAL_FILE) as partial:
            np.savez(partial, of=of, rows=np.concatenate(rows))  # type: ignore[arg-type]
