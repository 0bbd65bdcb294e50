"""Reconstructions against their images: Frechet and kernel distance, PSNR, SSIM, LPIPS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import images
from dinosae_jax.eval import distances, features, image_quality, interpolation, results
from dinosae_jax.eval.protocols import generated, inputs, references
from dinosae_jax.eval.protocols.inputs import Subject
from dinosae_jax.flow import sphere
from dinosae_jax.inference import batching
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models import autoencoder as autoencoder_lib
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.runtime import console, sharding
from dinosae_jax.weights import conversion

INTERPOLATED = "interpolated_frechet"
PAIRED = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}  # of an image and its reconstruction
CONVENTIONS = {
    "psnr": "mean of dB over images, range [0, 1], at most 100 dB (RAE)",
    "ssim": "torchmetrics: Gaussian 11x11, sigma 1.5, reflected borders, full image (RAE)",
    "lpips": "VGG16, version 0.1",
}


def run(
    config: ml_collections.ConfigDict,
    subject: Subject,
    network: features.FeatureNetwork,
    metrics: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    folder: epath.Path,
) -> list[results.Result]:
    """Every metric of an autoencoder on the evaluation images of a data set.

    Raises:
      ValueError: before long work, for too few images or a reference of another recipe; later for
        reconstructions or features that are not finite.
    """
    autoencoder = subject.autoencoder
    assert autoencoder is not None
    data = images.open_images(config.data, "eval")
    count = min(len(data), config.images or len(data))
    compared = tuple(metric for metric in metrics if metric in network.metrics)
    taps = generated.taps_of(network, compared)
    opened = references.open_reference(config, network, taps) if config.reference else None
    if opened:
        references.check_recipes(network, opened, taps, config.data.image_size)
    plain = tuple(metric for metric in compared if metric != INTERPOLATED)
    known = opened.known if opened else count
    distances.check_counts(plain, count, known, config.kernel_subset_size)
    if INTERPOLATED in compared:  # against the same images, whatever the reference is
        distances.check_counts((INTERPOLATED,), count, count, config.kernel_subset_size)
    lpips = conversion.load(config.weights.lpips, ("lpips",)) if "lpips" in metrics else None
    paired = tuple(metric for metric in metrics if metric in PAIRED)
    reconstruct = functools.partial(
        _compiled_reconstruct(autoencoder.modules, paired, config.uint8_conversion),
        autoencoder.variables,
        sharding.replicate(lpips.variables["lpips"] if lpips else {}, mesh),
    )
    both, values = _measure(config, data, network, taps, mesh, count, reconstruct)
    rows = [_paired_row(config, name, values[name], data) for name in paired]
    if not compared:
        return rows
    reference = distances.Reference(
        both["images"], f"{config.data.source} eval, the same images", data.fingerprint
    )
    far = opened.load(mesh, folder) if opened else reference
    prefix = "" if opened else "r"
    made = both["reconstructions"]
    rows += generated.all_distances(config, network, plain, made, far, prefix)
    if INTERPOLATED in compared:
        between = _interpolated(config, data, network, mesh, count, autoencoder)
        only = (INTERPOLATED,)
        rows += generated.all_distances(config, network, only, between, reference, "")
    return rows


def _measure(
    config: ml_collections.ConfigDict,
    data: images.ImageSource,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    count: int,
    reconstruct: Callable[[jax.Array], dict[str, Any]],
) -> tuple[dict[str, features.FeatureSet], dict[str, np.ndarray]]:
    """One pass: features of images and reconstructions, and paired metrics [n] float64 by name."""
    collectors = {
        "images": _collector(config, network, taps, "stored", f"{config.data.source} eval"),
        "reconstructions": _collector(
            config, network, taps, config.uint8_conversion, "reconstructions"
        ),
    }

    def running() -> Iterator[dict[str, Any]]:
        for batch in _batches(config, data, mesh, count):
            made = reconstruct(batch["image"])
            sets = {"images": batch["image"], "reconstructions": made["image"]}
            taken = {name: network(each, taps) for name, each in sets.items()} if taps else {}
            yield {**batch, **made, "taps": taken}

    values: dict[str, list[np.ndarray]] = {}
    for done in batching.one_behind(running()):
        index, mask = sharding.gather(done["index"]), sharding.gather(done["mask"])
        _check_finite(sharding.gather(done["finite"]), index)
        for name, each in done["metrics"].items():
            values.setdefault(name, []).append(sharding.gather(each)[mask].astype(np.float64))
        for name, rows in done["taps"].items():
            collectors[name].add({k: sharding.gather(v) for k, v in rows.items()}, index, mask)
    whole = {name: np.concatenate(each) for name, each in values.items()}
    return {name: each.finish() for name, each in collectors.items()} if taps else {}, whole


def _check_finite(finite: np.ndarray, index: np.ndarray) -> None:
    """Raises ValueError where a reconstruction is not finite: 8 bits would make it black."""
    if not finite.all():
        raise ValueError(
            f"reconstructions must be finite; got NaN or infinity in {np.sum(~finite)} of a batch "
            f"of {len(finite)} (first: image {index[~finite][0]}); check the weights, or pass "
            "--config.dtype=float32"
        )


def _collector(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    conversion: str,
    what: str,
) -> features.Collector:
    about = {"resolution": config.data.image_size, "uint8_conversion": conversion, "images": what}
    return features.Collector({tap: network.recipe(tap, **about) for tap in taps})


def _batches(
    config: ml_collections.ConfigDict, data: images.ImageSource, mesh: jax.sharding.Mesh, count: int
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, with progress."""
    size = sharding.device_multiple(config.batch_size, mesh)
    batches = inputs.dataset_batches(data, config, mesh, count)
    return features.place(console.progress(config.name, batches, count, size), mesh)


def _paired_row(
    config: ml_collections.ConfigDict, name: str, values: np.ndarray, data: images.ImageSource
) -> results.Result:
    recipe = {
        "convention": CONVENTIONS[name],
        "uint8_conversion": config.uint8_conversion,
        "resolution": config.data.image_size,
        "crop": "adm_centre_crop",
    }
    where = f"{config.data.source} eval, the same images"
    return results.Result(
        PAIRED[name],
        float(values.mean()),
        len(values),
        recipe,
        reference=where,
        reference_hash=data.fingerprint,
        reference_count=len(values),
    )


@functools.lru_cache
def _compiled_reconstruct(
    modules: autoencoder_lib.AutoencoderModules, metrics: tuple[str, ...], conversion: str
) -> Callable[..., dict[str, Any]]:
    """Jit of (variables, lpips variables, uint8 [b, h, w, 3]) -> reconstructions and metrics.

    The result has 'image', uint8 [b, h, w, 3], 'metrics', name -> [b], and 'finite', bool [b].
    """

    @jax.jit
    def reconstruct(variables: Any, lpips: Any, image: jax.Array) -> dict[str, Any]:
        pixels = autoencoder_lib.unit_interval(image)
        encoded = autoencoder_lib.encode(modules, variables, pixels)
        decoded = autoencoder_lib.decode(modules, variables, encoded.tokens, encoded.grid)
        made = image_quality.to_uint8(decoded, conversion)
        rounded = autoencoder_lib.unit_interval(made)
        functions: dict[str, Callable[..., Any]] = {
            "psnr": image_quality.psnr,
            "ssim": image_quality.ssim,
            "lpips": functools.partial(LPIPS().apply, lpips),
        }
        with jax.default_matmul_precision("highest"):
            values = {name: functions[name](rounded, pixels) for name in metrics}
        finite = jnp.isfinite(decoded).all((1, 2, 3))
        return {"image": made, "metrics": values, "finite": finite}

    return reconstruct


def _interpolated(
    config: ml_collections.ConfigDict,
    data: images.ImageSource,
    network: features.FeatureNetwork,
    mesh: jax.sharding.Mesh,
    count: int,
    autoencoder: Autoencoder,
) -> features.FeatureSet:
    """Features of images decoded half way between each latent and its nearest neighbour's.

    Neighbours are nearest in the mean patch token. Each token moves along the sphere, and its norm
    changes linearly.
    """
    console.report(f"{config.name}: nearest neighbours and their midpoints")
    own = features.encoder(autoencoder.modules, autoencoder.variables, "", mesh)
    tap = (features.ENCODER_TAP,)
    collector = _collector(config, own, tap, "stored", "images")
    pooled = features.extract(own, _batches(config, data, mesh, count), collector)
    nearest = interpolation.nearest_neighbours(pooled.features[features.ENCODER_TAP])
    partner = np.zeros(len(data), np.int64)
    partner[pooled.index] = pooled.index[nearest]
    crop = images.recipe_of(config.data)
    midpoints = _compiled_midpoints(autoencoder.modules, config.uint8_conversion)

    def others() -> Iterator[features.Batch]:
        for batch in inputs.dataset_batches(data, config, mesh, count):
            wanted = partner[np.maximum(batch["index"], 0)]
            second = np.stack([crop.evaluate(data[int(i)]["image"]) for i in wanted])
            yield {**batch, "image": second}

    pairs = zip(_batches(config, data, mesh, count), features.place(others(), mesh), strict=True)
    made = (
        {**first, "image": midpoints(autoencoder.variables, first["image"], second["image"])}
        for first, second in pairs
    )
    taps = (network.metrics[INTERPOLATED][1],)
    collector = _collector(config, network, taps, config.uint8_conversion, "interpolations")
    return features.extract(network, made, collector)


@functools.lru_cache
def _compiled_midpoints(
    modules: autoencoder_lib.AutoencoderModules, conversion: str
) -> Callable[..., jax.Array]:
    @jax.jit
    def midpoints(variables: Any, first: jax.Array, second: jax.Array) -> jax.Array:
        a, b = (
            autoencoder_lib.encode(modules, variables, autoencoder_lib.unit_interval(each))
            for each in (first, second)
        )
        middle = sphere.geodesic(a.tokens, b.tokens, 0.5)
        z = sphere.project(middle, 0.5 * (sphere.norm(a.tokens) + sphere.norm(b.tokens)))
        decoded = autoencoder_lib.decode(modules, variables, z, a.grid)
        return image_quality.to_uint8(decoded, conversion)

    return midpoints
