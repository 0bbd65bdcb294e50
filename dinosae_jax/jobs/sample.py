"""Draws images from a trained flow and lays the first of them out in one grid.

The workdir holds what `inference.drawing` writes, and grid.png.
"""

from __future__ import annotations

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import adm_npz, png
from dinosae_jax.inference import drawing
from dinosae_jax.report import pictures
from dinosae_jax.runtime import console, snapshots

GRID_IMAGES, GRID_COLUMNS = 100, 10


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Draws what the config describes; finished chunks are kept.

    Args:
      config: config of `config.sample_defaults`.
      folder: folder of the images.

    Raises:
      ValueError: see `drawing.draw_series`.
      stopping.Interrupted: after a signal, with every finished chunk saved.
    """
    label_names = drawing.draw_series(config, folder)
    if jax.process_index() == 0 and not (folder / "grid.png").exists():
        samples = adm_npz.open_archive(snapshots.local(folder / "samples.npz"))
        first = next(samples.batches(GRID_IMAGES))
        labels = np.load(snapshots.local(folder / "labels.npy"))[: len(first)]
        shown = [label_names[label] for label in labels]
        png.write_png(folder / "grid.png", pictures.labelled_grid(first, shown, GRID_COLUMNS))
        console.report(f"{config.name}: wrote {folder / 'grid.png'}")
