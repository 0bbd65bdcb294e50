"""Samples against a reference: an .npz of images, of moments, or a data set."""

from __future__ import annotations

import functools

import jax
import ml_collections
from etils import epath
from jax.experimental import multihost_utils

from dinosae_jax.data import adm_npz
from dinosae_jax.eval import distances, features, results
from dinosae_jax.eval.protocols import inputs, references
from dinosae_jax.inference import drawing
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.runtime import console, snapshots


def run(
    config: ml_collections.ConfigDict,
    subject: inputs.Subject,
    network: features.FeatureNetwork,
    metrics: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    folder: epath.Path,
) -> list[results.Result]:
    """Every metric of an .npz of samples, or of a flow, which is sampled first."""
    taps = taps_of(network, metrics)
    compared = taps_of(network, tuple(m for m in metrics if m != "inception_score"))
    count, resolution, labels = _expected(config, subject)
    opened = references.open_reference(config, network, compared) if compared else None
    if opened:
        references.check_recipes(network, opened, compared, resolution)
    known = opened.known if opened else None
    distances.check_counts(metrics, count, known, config.kernel_subset_size)
    archive = subject.archive or draw_samples(config, folder)
    reference = opened.load(mesh, folder) if opened else None
    console.report(f"{config.name}: features of {count} samples")
    recipe = functools.partial(
        network.recipe,
        resolution=resolution,
        uint8_conversion="stored" if subject.archive else "round",
        images="samples",
        labels=labels,
    )
    collector = features.Collector({tap: recipe(tap) for tap in taps})
    generated = features.extract(
        network, references.archive_batches(config, archive, mesh), collector
    )
    return all_distances(config, network, metrics, generated, reference, "g")


def all_distances(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    metrics: tuple[str, ...],
    generated: features.FeatureSet,
    reference: distances.Reference | None,
    prefix: str,
) -> list[results.Result]:
    """The results of all metrics that compare features."""
    options = (prefix, config.kernel_subset_size, functools.partial(_tell_blocks, config.name))
    return [
        result
        for metric in metrics
        for result in distances.distance(metric, network, generated, reference, *options)
    ]


def taps_of(network: features.FeatureNetwork, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The taps of some metrics, each once."""
    taps = (network.metrics[metric][1] for metric in metrics if metric in network.metrics)
    return tuple(dict.fromkeys(taps))


def draw_samples(config: ml_collections.ConfigDict, folder: epath.Path) -> adm_npz.Archive:
    """Draws the samples of a flow into `folder`/samples, which every host must see."""
    wanted = config.sample.copy_and_resolve_references()
    wanted.name = f"{config.name} samples"
    wanted.init_from, wanted.seed, wanted.dtype = config.init_from, config.seed, config.dtype
    drawing.draw_series(wanted, folder / "samples")
    multihost_utils.sync_global_devices("samples are written")
    return adm_npz.open_archive(snapshots.local(folder / "samples" / "samples.npz"))


def _expected(config: ml_collections.ConfigDict, subject: inputs.Subject) -> tuple[int, int, str]:
    """Number of samples, their side in pixels and their labels, before a flow is sampled."""
    if subject.archive:
        return subject.archive.shape[0], references.side_of(subject.archive, "samples"), ""
    assert subject.source is not None
    dit = subject.source.model["dit"]
    wanted = (config.sample.labels, config.sample.count, dit["num_classes"], config.seed)
    return len(drawing.choose_labels(*wanted)), PATCH_SIZE * dit["input_size"], config.sample.labels


def _tell_blocks(name: str, done: int, total: int) -> None:
    if total >= 100 and done % (total // 10) == 0:
        console.report(f"{name}: precision and recall {100 * done // total}%")
