"""Feature maps of teacher and student as colours; writes pca.png."""

from __future__ import annotations

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import images, png
from dinosae_jax.eval.protocols import inputs, provenance
from dinosae_jax.models import autoencoder as autoencoder_lib
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.report import pca
from dinosae_jax.runtime import console


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Draws the figure.

    Args:
      config: config of `configs/pca.py`.
      folder: where pca.png goes.

    Raises:
      ValueError: for missing weights, no images, or an unknown `fitted_on`.
    """
    if config.count < 1:
        raise ValueError(f"the figure needs at least 1 image; got count={config.count}; raise it")
    if config.fitted_on not in ("teacher", "joint"):
        raise ValueError(
            f"fitted_on is 'teacher' or 'joint'; got {config.fitted_on!r}; choose one of them"
        )
    autoencoder = inputs.open_autoencoder(config, inputs.open_weights(config))
    inputs.require_teacher(autoencoder)
    shown = choose_images(config)
    provenance.prepare_workdir(config, folder)
    side = config.data.image_size // PATCH_SIZE
    teacher, student = (
        function(shown).reshape(len(shown), side, side, -1)
        for function in (autoencoder.encode_teacher, autoencoder.encode)
    )
    for note in autoencoder.notes:
        console.report(f"{config.name}: {note}")
    cosine = mean_cosine(teacher, student)
    console.report(f"{config.name}: mean cosine of student and teacher {cosine:.4f}")
    if jax.process_index() == 0:
        figure = pca.figure(shown, teacher, student, config.fitted_on)
        png.write_png(folder / "pca.png", figure)
        console.report(f"{config.name}: wrote {folder / 'pca.png'} (images, teacher, student)")


def choose_images(config: ml_collections.ConfigDict) -> np.ndarray:
    """Held-out images, evenly spaced over the data set: float32 [b, h, w, 3] in [0, 1]."""
    source = images.open_images(config.data, "eval")
    crop = images.recipe_of(config.data)
    chosen = np.linspace(0, len(source) - 1, min(config.count, len(source))).round()
    squares = [crop.evaluate(source[int(index)]["image"]) for index in chosen]
    return autoencoder_lib.unit_interval(np.stack(squares))


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine of the tokens [..., d] of two networks."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return float(np.mean(np.sum(first * second, axis=-1) / np.maximum(norms, 1e-12)))
