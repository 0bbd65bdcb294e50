"""The moments of ADM's reference files, which hold images and moments of more images."""

import dataclasses
import pathlib

import numpy as np

from dinosae_jax import names
from dinosae_jax.data import adm_npz
from dinosae_jax.eval.frechet import Statistics, check_moments
from dinosae_jax.eval.recipe import Recipe

ADM_RECIPE = Recipe(
    network="inception_fid",
    tap="pool3",
    resize="tf1_bilinear",
    uint8_conversion="stored",
    count=names.IMAGENET_TRAIN_IMAGES,
    images="imagenet2012 train, as published",
)


MOMENTS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def read_moments(path: pathlib.Path, tap: str, recipe: Recipe = ADM_RECIPE) -> Statistics | None:
    """Reads the moments that a reference stores for one tap.

    Args:
      path: the reference.
      tap: 'pool3' (FID) or 'spatial' (sFID).
      recipe: what made the moments where the file does not say so; the published files do not.

    Returns:
      The moments, or None where the file holds images alone.

    Raises:
      ValueError: unknown tap, or moments that do not belong together or are not finite.
    """
    if tap not in MOMENTS:
        raise ValueError(f"a reference stores the taps {sorted(MOMENTS)}, got {tap!r}")
    members = MOMENTS[tap]
    resolution = adm_npz.open_archive(path).shape[1]
    with adm_npz.open_members(path) as archive:
        if members[0] not in archive.files:
            return None
        mean, covariance = (np.asarray(archive[name], np.float64) for name in members)
        if "recipe" in archive.files:
            recipe = Recipe.from_json(str(archive["recipe"]))
    check_moments(path, mean, covariance)
    recipe = dataclasses.replace(recipe, tap=tap, resolution=resolution)
    return Statistics(recipe.count, mean, covariance * (recipe.count - 1), recipe)
