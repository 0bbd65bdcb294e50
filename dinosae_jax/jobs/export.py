"""Exports a trained model: the moving averages of its networks in one self-contained folder."""

from __future__ import annotations

import jax
import ml_collections
from etils import epath

from dinosae_jax import licences
from dinosae_jax.eval.protocols import inputs
from dinosae_jax.inference import autoencoder, published
from dinosae_jax.names import AUTOENCODER_ROLES
from dinosae_jax.runtime import console, files, lease
from dinosae_jax.weights import weight_source

# The roles in an export, where the run has them; discriminator and optimizers are left out.
EXPORTED = (*AUTOENCODER_ROLES, "dit")


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes the export of `config.init_from` into the folder, which `Autoencoder.load` reads.

    Args:
      config: config of `config.export_defaults`.
      folder: the new folder.

    Raises:
      ValueError: where the workdir is not empty, init_from is not an autoencoder, or a licence
        does not allow it.
    """
    source = published.complete_flow(inputs.open_weights(config), config.autoencoder)
    source = autoencoder.complete(source, config.pixel_range)
    if config.permissive:
        licences.require_permissive(source.weights)
    if jax.process_index() != 0:
        return
    roles = tuple(role for role in EXPORTED if role in source.variables)
    weight_source.export(source, folder, roles)
    for note in source.notes:
        console.report(f"{config.name}: {note}")
    for role, entry in source.weights.items():
        console.report(f"{config.name}: {licences.sentence(role, entry)}")
    size = sum(files.size(file) for file in folder.iterdir() if file.name != lease.FILE)
    console.report(f"{config.name}: wrote {', '.join(roles)} to {folder} ({size / 1e6:,.1f} MB)")
