"""Mean and variance of latents by position and channel, which RAE's flows are normalised by.

RAE (arXiv 2510.11690) measures them once for an encoder and a size of images; here they are
measured when the training of a decoder begins that has `model.decoder.statistics`, and travel with
that decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax.data import loading
from dinosae_jax.models import autoencoder
from dinosae_jax.runtime import agreement, files, sharding, stopping
from dinosae_jax.train import autoencoder_step, latent_norms

STATISTICS_FILE = "latent_statistics.npz"
Moments = dict[str, NDArray[np.float32]]


def are_missing(decoder: dict[str, Any]) -> bool:
    """Whether a decoder's variables have room for statistics that were not measured yet."""
    return "statistics" in decoder and not np.any(decoder["statistics"]["mean"])


def measure(
    config: ml_collections.ConfigDict,
    spec: autoencoder_step.StepSpec,
    frozen: autoencoder_step.Variables,
    source: loading.Source,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    of: str,
) -> Moments:
    """Statistics of the latents of training images in a flow's crop, measured once per workdir.

    Measures `latent_norms.MEASURED_IMAGES` images in the order of training, a small set about once,
    in ADM's centre crop.

    Args:
      config: data, eval.batch_size, seed, name; model.decoder.statistics_side is the grid's side
        or 1 (per channel, over all positions).
      spec: static.
      frozen: roles stem and vit, on the devices.
      source: of the training images.
      workdir: gets `STATISTICS_FILE`.
      mesh: the devices.
      of: `latent_norms.identity` of what is measured.

    Returns:
      "mean" and "variance" [d, side, side].

    Raises:
      stopping.Interrupted: after a signal.
    """
    path = workdir / STATISTICS_FILE
    known = agreement.from_first(lambda: _read(path, of))
    if known is not None:
        return known
    centred = config.copy_and_resolve_references()
    centred.data.crop = "center"
    what = "the statistics of latents"
    batches = latent_norms.measured_batches(centred, source, mesh, what)
    moments, total = _moments(spec, frozen, mesh), 0
    mean = square = np.zeros(())
    for batch in batches:
        stopping.check(f"{config.name}, while it measured {what},")
        ours, squares = moments(batch)
        total += 1  # Chan's update; every batch has the same size
        step = ours - mean
        mean = mean + step / total
        square = square + squares + step**2 * (total - 1) / total
    side = config.model.decoder.statistics_side
    found = _shaped(mean, square / total, side)
    if jax.process_index() == 0:
        with files.publishing(path) as partial:
            np.savez(partial, of=of, **found)  # type: ignore[arg-type]
    return found


def _moments(
    spec: autoencoder_step.StepSpec, frozen: autoencoder_step.Variables, mesh: jax.sharding.Mesh
) -> Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """Batch -> mean and variance of its latents, [n, d] float64 each."""

    @jax.jit
    def moments(frozen: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = autoencoder.unit_interval(image)
        tokens = autoencoder.encode(spec.modules, frozen, scaled).tokens
        return jnp.mean(tokens, axis=0), jnp.var(tokens, axis=0)

    def of_batch(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        pair = moments(frozen, sharding.put_batch(batch, mesh)["image"])
        mean, variance = (sharding.gather(each).astype(np.float64) for each in pair)
        return mean, variance

    return of_batch


def _shaped(mean: np.ndarray, variance: np.ndarray, side: int) -> Moments:
    """[n, d] -> [d, side, side]; over all positions where side is 1."""
    if side == 1:
        variance = variance.mean(axis=0, keepdims=True) + mean.var(axis=0, keepdims=True)
        mean = mean.mean(axis=0, keepdims=True)
    return {
        name: each.T.reshape(-1, side, side).astype(np.float32)
        for name, each in (("mean", mean), ("variance", variance))
    }


def _read(path: epath.Path, of: str) -> Moments | None:
    if not path.exists():
        return None
    with path.open("rb") as opened, np.load(opened) as file:
        return {n: file[n] for n in ("mean", "variance")} if str(file["of"]) == of else None
