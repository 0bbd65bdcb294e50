"""Where results come from: hashes of weights and config, the step, the commit of this code."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
from typing import Any

import jax
import ml_collections

from dinosae_jax import config as config_lib
from dinosae_jax.runtime import files
from dinosae_jax.weights import integrity, weight_source


def checkpoint_step(source: weight_source.WeightSource) -> int | None:
    """The step of a run's checkpoint; None for exports, conversions and random weights."""
    return int(source.path.name) if source.path.name.isdigit() else None


def weights_sha256(variables: Any, roles: tuple[str, ...]) -> str:
    """A hash of the parameters of some roles, the same on any number of devices."""
    return integrity.digest(integrity.checksums({role: variables[role] for role in roles}))


def config_sha256(config: ml_collections.ConfigDict) -> str:
    """A hash of the resolved config."""
    return hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()


def commit() -> str:
    """The commit of this code, with '-dirty' appended where tracked files differ from it.

    The empty string where the code is not part of a git checkout, as when it is installed.
    """
    path = pathlib.Path(__file__)
    try:
        # An installation may lie inside another project's checkout, whose commit says nothing.
        _git(path.parent, "ls-files", "--error-unmatch", path.name)
        return _git(path.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def prepare_workdir(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Makes the folder of the results and writes the config into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        files.write_json(folder / "config.json", json.loads(config_lib.to_json(config)))
