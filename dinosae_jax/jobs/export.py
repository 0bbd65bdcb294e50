"""Exports a trained model: the moving averages of its networks in one self-contained folder."""

from __future__ import annotations

import pathlib

import jax
import ml_collections

from dinosae_jax.eval.protocols import inputs
from dinosae_jax.inference import autoencoder
from dinosae_jax.names import AUTOENCODER_ROLES
from dinosae_jax.runtime import console
from dinosae_jax.weights import weight_source

# What an export holds of a run, where it has them; critics and optimizers stay behind.
EXPORTED = (*AUTOENCODER_ROLES, "dit")


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Writes the export of `config.init_from` into the folder, which `Autoencoder.load` reads.

    Args:
      config: of `config.export_defaults`.
      folder: the new folder.

    Raises:
      ValueError: where the workdir holds something already, or init_from is no autoencoder.
    """
    source = autoencoder.complete(inputs.open_weights(config), config.pixel_range)
    if jax.process_index() != 0:
        return
    wanted = tuple(role for role in EXPORTED if role in source.variables)
    weight_source.export(source, folder, wanted)
    for note in source.notes:
        console.report(f"{config.name}: {note}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.report(f"{config.name}: wrote {', '.join(wanted)} to {folder} ({size / 1e6:,.1f} MB)")
