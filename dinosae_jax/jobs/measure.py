"""What the jobs that measure trained weights share: weights, images, progress, provenance."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from dinosae_jax import config as config_lib
from dinosae_jax.data import images
from dinosae_jax.eval import features
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.runtime import files, sharding
from dinosae_jax.weights import checkpoint, conversion, weight_source


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
        digest = weights_sha256(autoencoder.variables, ("stem", "vit"))
        return features.encoder(autoencoder.modules, autoencoder.variables, digest, mesh)
    role, converted = found
    variables = converted.variables[role]
    if role == "inception":
        return features.inception(variables, converted.metadata["files"][0]["sha256"], resize, mesh)
    # EfficientNet's file is saved anew before it is converted, so that its own hash tells nothing.
    digest = weights_sha256(converted.variables, (role,))
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


def checkpoint_step(source: weight_source.WeightSource) -> int | None:
    """The step of a run's checkpoint; None for exports, conversions and random weights."""
    return int(source.path.name) if source.path.name.isdigit() else None


def weights_sha256(variables: Any, roles: tuple[str, ...]) -> str:
    """A hash of the parameters of some roles, the same on any number of devices."""
    sums = checkpoint.checksums({role: variables[role] for role in roles})
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def config_sha256(config: ml_collections.ConfigDict) -> str:
    """A hash of the resolved config."""
    return hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()


def commit() -> str:
    """The commit of this code, with '-dirty' behind it where tracked files differ from it.

    The empty string where the code is no part of a git checkout, as when it is installed.
    """
    path = pathlib.Path(__file__)
    try:
        # An installation may lie inside another project's checkout, whose commit says nothing.
        _git(path.parent, "ls-files", "--error-unmatch", path.name)
        return _git(path.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: pathlib.Path, *arguments: str) -> str:
    found = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return found.stdout.strip()


def prepare_workdir(config: ml_collections.ConfigDict, workdir: str) -> pathlib.Path:
    """The folder of the results, with the config in it."""
    folder = pathlib.Path(workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        files.write_json(folder / "config.json", json.loads(config_lib.to_json(config)))
    return folder
