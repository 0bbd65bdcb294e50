"""What samples are compared with: an .npz of images, of moments, or a data set."""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import adm_npz, images
from dinosae_jax.eval import adm_moments, distances, features, frechet
from dinosae_jax.eval.protocols import inputs
from dinosae_jax.eval.recipe import Recipe, check_comparable
from dinosae_jax.runtime import console, files, sharding, snapshots

KEPT_REFERENCE = 10_000  # images of a data set whose features Precision/Recall and KID see, as ADM


def check_recipes(
    network: features.FeatureNetwork,
    opened: OpenedReference,
    taps: tuple[str, ...],
    resolution: int,
) -> None:
    """Raises ValueError where a reference was made by another recipe, before it is computed."""
    for tap in taps:
        check_comparable(network.recipe(tap, resolution=resolution), opened.recipe(tap))


def archive_batches(
    config: ml_collections.ConfigDict, archive: adm_npz.Archive, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
    """An archive's images on the devices, with progress."""
    size = sharding.device_multiple(config.batch_size, mesh)
    batches = features.archive_batches(archive, size, sharding.local_rows(mesh, size))
    return features.place(console.progress(config.name, batches, archive.shape[0], size), mesh)


@dataclasses.dataclass(frozen=True)
class OpenedReference:
    """A reference whose file or data set is open, before its features are computed.

    Attributes:
      recipe: tap -> what is known about how its features are made.
      known: number of images whose features will be known; None for moments alone.
      load: (mesh, folder) -> the reference with its features.
    """

    recipe: Callable[[str], Recipe]
    known: int | None
    load: Callable[[jax.sharding.Mesh, epath.Path], distances.Reference]


def open_reference(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork, taps: tuple[str, ...]
) -> OpenedReference:
    """Opens `config.reference`, or the data set where it is empty.

    Raises:
      ValueError: for an .npz of another layout, or a data set that cannot be read.
    """
    if not config.reference:
        return _dataset_reference(config, network, taps)
    path = local_npz("reference", config.reference)
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

    def load(mesh: jax.sharding.Mesh, folder: epath.Path) -> distances.Reference:
        console.report(f"{config.name}: features of {count} reference images")
        collector = features.Collector({tap: recipe(tap) for tap in taps}, spaced)
        batches = console.progress(
            config.name,
            inputs.dataset_batches(source, config, mesh, count),
            count,
            sharding.device_multiple(config.batch_size, mesh),
        )
        extracted = features.extract(network, features.place(batches, mesh), collector)
        if jax.process_index() == 0:
            for tap in taps:
                frechet.write_statistics(folder / f"reference_{tap}.npz", extracted.moments[tap])
        return distances.Reference(extracted, f"{config.data.source} train", source.fingerprint)

    return OpenedReference(recipe, len(spaced), load)


def _archive_reference(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    path: epath.Path,
) -> OpenedReference:
    """A reference of images, with the file's moments of more images where they fit the network."""
    archive = adm_npz.open_archive(path)
    about = {
        "resolution": side_of(archive, "a reference's images"),
        "uint8_conversion": "stored",
        "images": path.name,
    }
    stored: dict[str, frechet.Statistics] = {}
    if network.name == adm_moments.NETWORK:
        for tap in set(taps) & set(adm_moments.MOMENTS):
            moments = adm_moments.read_moments(path, tap, moments_answer(config, path))
            stored |= {tap: moments} if moments else {}

    def recipe(tap: str) -> Recipe:
        return stored[tap].recipe if tap in stored else network.recipe(tap, **about)

    def load(mesh: jax.sharding.Mesh, folder: epath.Path) -> distances.Reference:
        console.report(f"{config.name}: features of {archive.shape[0]} reference images")
        collector = features.Collector({tap: network.recipe(tap, **about) for tap in taps})
        extracted = features.extract(network, archive_batches(config, archive, mesh), collector)
        with_stored = dataclasses.replace(extracted, moments={**extracted.moments, **stored})
        return distances.Reference(with_stored, path.name, files.file_sha256(path))

    return OpenedReference(recipe, archive.shape[0], load)


def moments_answer(config: ml_collections.ConfigDict, path: epath.Path) -> Recipe | None:
    """What `reference_moments` says of moments that do not say how they were made."""
    about = config.reference_moments
    if not about.count:
        return None
    return Recipe(
        network=adm_moments.NETWORK,
        tap="pool3",
        resize=about.resize,
        uint8_conversion="stored",
        count=about.count,
        images=path.name,
    )


def _moments_reference(
    config: ml_collections.ConfigDict,
    network: features.FeatureNetwork,
    taps: tuple[str, ...],
    path: epath.Path,
) -> OpenedReference:
    """A reference of the moments of one tap, as an earlier evaluation wrote them."""
    moments = frechet.read_statistics(path)
    adm_moments.check_covariance(path, moments.scatter)
    others = [tap for tap in taps if tap != moments.recipe.tap]
    if others:
        raise ValueError(
            f"metrics must read the tap of the reference, {moments.recipe.tap} in {path}; got "
            f"metrics that need {', '.join(others)}; set metrics to frechet, or give a reference "
            "with images"
        )

    def load(mesh: jax.sharding.Mesh, folder: epath.Path) -> distances.Reference:
        nothing = features.FeatureSet({}, np.zeros(0, np.int64), {moments.recipe.tap: moments})
        return distances.Reference(nothing, path.name, files.file_sha256(path))

    return OpenedReference(lambda tap: moments.recipe, None, load)


def side_of(archive: adm_npz.Archive, what: str) -> int:
    """The side of square images in pixels; raises ValueError, naming `what`, for others."""
    _, height, width, _ = archive.shape
    if height != width:
        raise ValueError(f"{what} are square; got {height} x {width} in {archive.path}; crop them")
    return height


def local_npz(field: str, named: str) -> epath.Path:
    """The .npz file that a field of the config names, or a copy on this machine.

    Raises:
      ValueError: it is no .npz file.
    """
    path = files.path(named)
    here = snapshots.local(path) if path.is_file() else path
    if not path.is_file() or not zipfile.is_zipfile(here):
        state = "is not a zip file" if path.is_file() else "does not exist"
        raise ValueError(f"{field} must be an .npz file; got {path}, which {state}; check the path")
    return here
