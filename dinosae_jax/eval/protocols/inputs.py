"""Inputs of the jobs that measure trained weights: weights, images, feature networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np

from dinosae_jax.data import adm_npz, images
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import provenance
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.runtime import sharding
from dinosae_jax.weights import conversion, weight_source


def open_weights(config: ml_collections.ConfigDict) -> weight_source.WeightSource:
    """The weights of `init_from`, or random weights of `random_model` where it is empty.

    Raises:
      ValueError: where there are no weights, or a file is damaged.
    """
    if config.init_from:
        return weight_source.open_weights(config.init_from)
    return random_source(config.random_model.to_dict(), config.seed)


def open_autoencoder(
    config: ml_collections.ConfigDict, source: weight_source.WeightSource
) -> Autoencoder:
    """The autoencoder of a source; `batch_size` becomes a multiple of the devices."""
    return Autoencoder(source, config.dtype, batch_size=config.batch_size)


def pretrained_weights(given: ml_collections.ConfigDict) -> tuple[str, conversion.Weights] | None:
    """Role and weights of the pretrained feature network in the config, FID's Inception first.

    Args:
      given: `config.weights`, with the folders `inception` and `efficientnet`, '' for none.

    Raises:
      ValueError: a folder holds no converted weights of its network.
    """
    for role in ("inception", "efficientnet"):
        if given[role]:
            return role, conversion.load(given[role], (role,))
    return None


def feature_network(
    given: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    open_encoder: Callable[[], Autoencoder],
    resize: str = "tf1_bilinear",
) -> features.FeatureNetwork:
    """The network of the distances: the pretrained network of the config, or an encoder.

    Args:
      given: see `pretrained_weights`.
      mesh: where the network is copied to.
      open_encoder: called where no pretrained network is given.
      resize: of Inception's input.

    Raises:
      ValueError: a folder holds no converted weights of its network, or unknown resize.
    """
    pretrained = pretrained_weights(given)
    if pretrained is None:
        autoencoder = open_encoder()
        digest = provenance.weights_sha256(autoencoder.variables, ("stem", "vit"))
        return features.encoder(autoencoder.modules, autoencoder.variables, digest, mesh)
    role, converted = pretrained
    variables = converted.variables[role]
    if role == "inception":
        return features.inception(variables, converted.metadata["files"][0]["sha256"], resize, mesh)
    # EfficientNet's file is saved anew before it is converted, so the file's hash says nothing.
    digest = provenance.weights_sha256(converted.variables, (role,))
    return features.efficientnet(variables, digest, mesh)


def require_teacher(autoencoder: Autoencoder) -> None:
    """Raises ValueError where the weights hold no patch convolution of the teacher."""
    if "patch_embed" not in autoencoder.variables["vit"]["params"]:
        raise ValueError(
            "the teacher is the encoder with its own patch convolution; got weights without one "
            "(the official DINO-SAE file leaves it out); name weights trained from a converted "
            "DINOv3"
        )


def dataset_batches(
    source: images.ImageSource,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    limit: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the first `limit` images in ADM's centre crop; see `eval_batches`.

    Images beyond the limit have mask False.
    """
    size = sharding.device_multiple(config.batch_size, mesh)
    rows = sharding.local_rows(mesh, size)
    batches = images.eval_batches(source, config.data, batch_size=size, rows=rows)
    for batch, _ in zip(batches, range(-(-limit // size)), strict=False):
        yield {**batch, "mask": batch["mask"] & (batch["index"] < limit)}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      kind: 'autoencoder', 'flow' or 'samples'.
      name: the name in the table.
      source: the weights; None for samples.
      autoencoder: the autoencoder of the source, where kind is 'autoencoder'.
      archive: the images where kind is 'samples'; a flow's samples are drawn later.
    """

    kind: str
    name: str
    source: weight_source.WeightSource | None
    autoencoder: Autoencoder | None
    archive: adm_npz.Archive | None
