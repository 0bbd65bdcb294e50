"""The moments in ADM's reference files, which hold some images and the moments of many more."""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax import names
from dinosae_jax.data import adm_npz
from dinosae_jax.eval.frechet import Statistics, check_moments
from dinosae_jax.eval.recipe import Recipe
from dinosae_jax.runtime import files

NETWORK = "inception_fid"
ADM_RECIPE = Recipe(
    network=NETWORK,
    tap="pool3",
    resize="tf1_bilinear",
    uint8_conversion="stored",
    count=names.IMAGENET_TRAIN_IMAGES,
    images="imagenet2012 train, as published",
)
# The files of ADM's suite that hold the moments of ImageNet's training images: bytes -> sha256.
PUBLISHED = {
    # VIRTUAL_imagenet256_labeled.npz
    2_037_122_530: "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    # VIRTUAL_imagenet512.npz, also VIRTUAL_imagenet512_labeled.npz
    857_466_338: "6bde3fff169a9d05d6ff53e9a661177d3765d7b3a83e8b54b71a99b65a166ef8",
}
MOMENTS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ROUNDING = 1e-4  # of the largest number of a covariance: symmetry and sign may be off by this


def read_moments(path: epath.Path, tap: str, answer: Recipe | None = None) -> Statistics | None:
    """Reads the moments that a reference stores for one tap.

    A file says how its moments were made by a member `recipe`, or by being one of `PUBLISHED`.

    Args:
      path: the reference.
      tap: 'pool3' (FID) or 'spatial' (sFID).
      answer: how the moments were made, for a file that does not say so.

    Returns:
      The moments, or None where the file holds images alone.

    Raises:
      ValueError: unknown tap, moments that do not belong together or are none, or moments of which
        it is not known how they were made.
    """
    if tap not in MOMENTS:
        raise ValueError(
            f"a reference stores the taps {', '.join(sorted(MOMENTS))}; got {tap!r}; choose one of "
            "these"
        )
    resolution = adm_npz.open_archive(path).shape[1]
    stored = _members(path, MOMENTS[tap])
    if stored is None:
        return None
    mean, covariance, own = stored
    check_moments(path, mean, covariance)
    check_covariance(path, covariance)
    recipe = own or (ADM_RECIPE if is_published(path) else answer)
    if recipe is None or recipe.count < 2:
        raise ValueError(
            "moments are compared where it is known which resize made them and of how many images; "
            f"got {path}, which does not say and is none of ADM's ImageNet files by its sha256; "
            "pass --config.reference_moments.resize=tf1_bilinear (or half_pixel_bilinear) and "
            "--config.reference_moments.count=N, or a file of the images alone"
        )
    if answer and recipe is not answer:
        raise ValueError(
            f"reference_moments is for moments that do not say how they were made; got {path}, "
            "which does; leave reference_moments empty"
        )
    recipe = dataclasses.replace(recipe, tap=tap, resolution=resolution)
    return Statistics(recipe.count, mean, covariance * (recipe.count - 1), recipe)


def is_published(path: epath.Path) -> bool:
    """Whether a file is one of ADM's references of ImageNet, by its sha256."""
    wanted = PUBLISHED.get(files.size(path))
    return wanted is not None and files.file_sha256(path) == wanted


def check_covariance(path: epath.Path, covariance: NDArray[np.float64]) -> None:
    """Checks that a matrix [d, d] of a file is symmetric and has no negative eigenvalue.

    Raises:
      ValueError: it is no covariance.
    """
    largest = float(np.abs(covariance).max(initial=0.0))
    asymmetry = float(np.abs(covariance - covariance.T).max(initial=0.0))
    smallest = float(np.linalg.eigvalsh(covariance).min(initial=0.0))
    for found, what in ((asymmetry, "an asymmetric matrix"), (-smallest, "negative eigenvalues")):
        if found > ROUNDING * largest:
            raise ValueError(
                f"moments are symmetric and without negative eigenvalues; got {what} in "
                f"{path}, off by {found:.3g}; the file is damaged or holds something else"
            )


def _members(
    path: epath.Path, wanted: tuple[str, str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], Recipe | None] | None:
    """Mean, covariance and the file's own recipe; None where it has neither of the two."""
    with adm_npz.open_members(path) as archive:
        found = [name for name in wanted if name in archive.files]
        if not found:
            return None
        if len(found) == 1:
            raise ValueError(
                f"moments are {wanted[0]} and {wanted[1]}; got {path} with {found[0]} alone; add "
                "the other, or leave both out"
            )
        mean, covariance = (np.asarray(archive[name], np.float64) for name in wanted)
        own = Recipe.from_json(str(archive["recipe"])) if "recipe" in archive.files else None
    return mean, covariance, own
