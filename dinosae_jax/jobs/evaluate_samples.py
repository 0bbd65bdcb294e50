"""Samples against a reference: an .npz of images, of moments, or a data set."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from dinosae_jax.data import adm_npz, images
from dinosae_jax.eval import distances, features, frechet, results
from dinosae_jax.eval.recipe import Recipe, check_comparable
from dinosae_jax.inference import drawing
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.jobs import measure
from dinosae_jax.runtime import console, files, sharding
from dinosae_jax.weights import weight_source

KEPT_REFERENCE = 10_000  # images of a data set whose features Precision/Recall and KID see, as ADM


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      kind: 'autoencoder', 'flow' or 'samples'.
      name: in the table.
      source: weights; None for samples.
      autoencoder: of the source, where that is what is measured.
      archive: images; None for weights, a flow's are drawn later.
    """

    kind: str
    name: str
    source: weight_source.WeightSource | None
    autoencoder: Autoencoder | None
    archive: adm_npz.Archive | None


def run(
    config: ml_collections.ConfigDict,
    subject: Subject,
    network: features.FeatureNetwork,
    metrics: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> list[results.Result]:
    """Every metric of an .npz of samples, or of a flow, which is sampled first."""
    taps = taps_of(network, metrics)
    compared = taps_of(network, tuple(m for m in metrics if m != "inception_score"))
    count, resolution, labels = _expected(config, subject)
    opened = open_reference(config, network, compared) if compared else None
    if opened:
        check_recipes(network, opened, compared, resolution)
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
    generated = features.extract(network, archive_batches(config, archive, mesh), collector)
    return all_distances(config, network, metrics, generated, reference, "g")


def all_distances(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    metrics: tuple[str, ...],
    generated: features.FeatureSet,
    reference: distances.Reference | None,
    prefix: str,
) -> list[results.Result]:
    """The numbers of all metrics that compare features."""
    options = (prefix, config.kernel_subset_size, functools.partial(_tell_blocks, config.name))
    return [
        result
        for metric in metrics
        for result in distances.distance(metric, network, generated, reference, *options)
    ]


def check_recipes(
    network: features.FeatureNetwork,
    opened: OpenedReference,
    taps: tuple[str, ...],
    resolution: int,
) -> None:
    """Raises ValueError where a reference was made by another recipe, before it is computed."""
    for tap in taps:
        check_comparable(network.recipe(tap, resolution=resolution), opened.recipe(tap))


def taps_of(network: features.FeatureNetwork, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The features that some metrics read, each once."""
    found = (network.metrics[metric][1] for metric in metrics if metric in network.metrics)
    return tuple(dict.fromkeys(found))


def archive_batches(
    config: ml_collections.ConfigDict, archive: adm_npz.Archive, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
    """An archive's images on the devices, with progress."""
    size = sharding.device_multiple(config.batch_size, mesh)
    found = features.archive_batches(archive, size, sharding.local_rows(mesh, size))
    return features.place(console.progress(config.name, found, archive.shape[0], size), mesh)


def draw_samples(config: ml_collections.ConfigDict, folder: pathlib.Path) -> adm_npz.Archive:
    """The samples of a flow by the sample job, in `folder`/samples, which every host must see."""
    wanted = config.sample.copy_and_resolve_references()
    wanted.name = f"{config.name} samples"
    wanted.init_from, wanted.seed, wanted.dtype = config.init_from, config.seed, config.dtype
    drawing.run(wanted, str(folder / "samples"))
    multihost_utils.sync_global_devices("samples are written")
    return adm_npz.open_archive(folder / "samples" / "samples.npz")


@dataclasses.dataclass(frozen=True)
class OpenedReference:
    """A reference whose file or data set is open and nothing computed.

    Attributes:
      recipe: tap -> what is known of how its features are made.
      known: number of images whose features will be known; None for moments alone.
      load: (mesh, folder) -> the reference with its features.
    """

    recipe: Callable[[str], Recipe]
    known: int | None
    load: Callable[[jax.sharding.Mesh, pathlib.Path], distances.Reference]


def open_reference(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork, taps: tuple[str, ...]
) -> OpenedReference:
    """Opens `config.reference`, or the data set where it is empty.

    Raises:
      ValueError: for an .npz of another layout, or a data set that cannot be read.
    """
    if not config.reference:
        return _dataset_reference(config, network, taps)
    path = pathlib.Path(config.reference).expanduser()
    check_file("reference", path)
    with zipfile.ZipFile(path) as file:
        members = set(file.namelist())
    is_moments = "scatter.npy" in members
    return (_moments_reference if is_moments else _archive_reference)(config, network, taps, path)


def _dataset_reference(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork, taps: tuple[str, ...]
) -> OpenedReference:
    source = images.open_images(config.data, "train")
    count = min(len(source), config.reference_images or len(source))
    spaced = np.linspace(0, count - 1, min(count, KEPT_REFERENCE)).round().astype(np.int64)
    recipe = functools.partial(
        network.recipe,
        resolution=config.data.image_size,
        uint8_conversion="stored",
        images=f"{config.data.source} train",
    )

    def load(mesh: jax.sharding.Mesh, folder: pathlib.Path) -> distances.Reference:
        console.report(f"{config.name}: features of {count} reference images")
        collector = features.Collector({tap: recipe(tap) for tap in taps}, spaced)
        batches = console.progress(
            config.name,
            measure.dataset_batches(source, config, mesh, count),
            count,
            sharding.device_multiple(config.batch_size, mesh),
        )
        found = features.extract(network, features.place(batches, mesh), collector)
        if jax.process_index() == 0:
            for tap in taps:
                frechet.write_statistics(folder / f"reference_{tap}.npz", found.moments[tap])
        return distances.Reference(found, f"{config.data.source} train", source.fingerprint)

    return OpenedReference(recipe, len(spaced), load)


def _archive_reference(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    path: pathlib.Path,
) -> OpenedReference:
    """Images, and moments of more images where the file has those of the network's taps."""
    archive = adm_npz.open_archive(path)
    about = {
        "resolution": _side_of(archive, "a reference's images"),
        "uint8_conversion": "stored",
        "images": path.name,
    }
    stored: dict[str, frechet.Statistics] = {}
    if network.name == adm_npz.ADM_RECIPE.network:
        for tap in set(taps) & set(adm_npz.MOMENTS):
            moments = adm_npz.read_moments(path, tap)
            stored |= {tap: moments} if moments else {}

    def recipe(tap: str) -> Recipe:
        return stored[tap].recipe if tap in stored else network.recipe(tap, **about)

    def load(mesh: jax.sharding.Mesh, folder: pathlib.Path) -> distances.Reference:
        console.report(f"{config.name}: features of {archive.shape[0]} reference images")
        collector = features.Collector({tap: network.recipe(tap, **about) for tap in taps})
        found = features.extract(network, archive_batches(config, archive, mesh), collector)
        with_stored = dataclasses.replace(found, moments={**found.moments, **stored})
        return distances.Reference(with_stored, path.name, files.file_sha256(path))

    return OpenedReference(recipe, archive.shape[0], load)


def _moments_reference(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    path: pathlib.Path,
) -> OpenedReference:
    """Moments of one tap, as an earlier evaluation left them."""
    moments = frechet.read_statistics(path)
    others = [tap for tap in taps if tap != moments.recipe.tap]
    if others:
        raise ValueError(
            f"{path} holds the moments of {moments.recipe.tap}; got metrics that need "
            f"{', '.join(others)}; set metrics to frechet, or give a reference with images"
        )

    def load(mesh: jax.sharding.Mesh, folder: pathlib.Path) -> distances.Reference:
        nothing = features.FeatureSet({}, np.zeros(0, np.int64), {moments.recipe.tap: moments})
        return distances.Reference(nothing, path.name, files.file_sha256(path))

    return OpenedReference(lambda tap: moments.recipe, None, load)


def _expected(config: ml_collections.ConfigDict, subject: Subject) -> tuple[int, int, str]:
    """Number of samples, their side in pixels and their labels, before a flow is sampled."""
    if subject.archive:
        return subject.archive.shape[0], _side_of(subject.archive, "samples"), ""
    assert subject.source is not None
    dit = subject.source.model["dit"]
    wanted = (config.sample.labels, config.sample.count, dit["num_classes"], config.seed)
    return len(drawing.choose_labels(*wanted)), 16 * dit["input_size"], config.sample.labels


def _side_of(archive: adm_npz.Archive, what: str) -> int:
    _, height, width, _ = archive.shape
    if height != width:
        raise ValueError(f"{what} are square; got {height} x {width} in {archive.path}; crop them")
    return height


def _tell_blocks(name: str, done: int, total: int) -> None:
    if total >= 100 and done % (total // 10) == 0:
        console.report(f"{name}: precision and recall {100 * done // total}%")


def check_file(field: str, path: pathlib.Path) -> None:
    if not path.is_file() or not zipfile.is_zipfile(path):
        state = "is no such file" if path.is_file() else "does not exist"
        raise ValueError(f"{field} must be an .npz file; got {path}, which {state}; check the path")
