"""What the jobs that measure trained weights share: weights, images, progress, provenance."""

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
    """The weights of `init_from`, or random ones of `random_model` where it is empty.

    Raises:
      ValueError: where there are none, or a file is damaged.
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
    """Role and weights of the pretrained feature network that is given, FID's Inception first.

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
    """The space of the distances: the pretrained network that is given, or an encoder's own.

    Args:
      given: as of `pretrained_weights`.
      mesh: where the network is copied to.
      open_encoder: asked where no pretrained network is given.
      resize: of Inception's input.

    Raises:
      ValueError: a folder holds no converted weights of its network, or unknown resize.
    """
    found = pretrained_weights(given)
    if found is None:
        autoencoder = open_encoder()
        digest = provenance.weights_sha256(autoencoder.variables, ("stem", "vit"))
        return features.encoder(autoencoder.modules, autoencoder.variables, digest, mesh)
    role, converted = found
    variables = converted.variables[role]
    if role == "inception":
        return features.inception(variables, converted.metadata["files"][0]["sha256"], resize, mesh)
    # EfficientNet's file is saved anew before it is converted, so that its own hash tells nothing.
    digest = provenance.weights_sha256(converted.variables, (role,))
    return features.efficientnet(variables, digest, mesh)


def require_teacher(autoencoder: Autoencoder) -> None:
    """Raises ValueError where the weights hold no patch convolution of the teacher."""
    if "patch_embed" not in autoencoder.variables["vit"]["params"]:
        raise ValueError(
            "the teacher is DINOv3 behind its own patch convolution; these weights hold none (the "
            "official DINO-SAE file leaves it out); name weights trained from a converted DINOv3"
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
    found = images.eval_batches(source, config.data, batch_size=size, rows=rows)
    for batch, _ in zip(found, range(-(-limit // size)), strict=False):
        yield {**batch, "mask": batch["mask"] & (batch["index"] < limit)}


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
