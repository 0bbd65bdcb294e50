"""Parameters of one role as one file: frozen networks and exports.

A role is stored as `<role>-<sha256[:16]>.safetensors`, its leaves under their paths joined by
'/'. The full sha256 travels in whatever refers to the file and is compared when it is read.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from safetensors import numpy as safetensors

Tree = Any


class RoleFile(NamedTuple):
    """Where a role is stored: the file's name inside its folder, and its sha256 in hex."""

    name: str
    sha256: str


def write(folder: pathlib.Path, role: str, variables: Tree) -> RoleFile:
    """Writes a role once, from the first process; a file of the same content is left as it is.

    Args:
      folder: made if missing.
      role: name of the role.
      variables: nested dict of arrays, any float dtype.

    Returns:
      The file, named after its content.
    """
    data = _serialise(variables)
    sha256 = hashlib.sha256(data).hexdigest()
    file = RoleFile(f"{role}-{sha256[:16]}.safetensors", sha256)
    target = folder / file.name
    if jax.process_index() == 0 and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.rename(target)
    return file


def read(folder: pathlib.Path, file: RoleFile) -> Tree:
    """Reads a role back and checks its content.

    Raises:
      ValueError: where the file is missing or its sha256 is another one.
    """
    path = folder / file.name
    if not path.exists():
        raise ValueError(f"the frozen network {path} is missing; put the file back")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{path} is not the file that was saved (sha256 {found[:16]}, expected "
            f"{file.sha256[:16]}); put the original back"
        )
    return traverse_util.unflatten_dict(safetensors.load(data), sep="/")


def sha256(variables: Tree) -> str:
    """The sha256 that `write` would name, without writing: the identity of a network's weights."""
    return hashlib.sha256(_serialise(variables)).hexdigest()


def link(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes a role file appear in another folder, without a second copy where that is possible."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(source.read_bytes())
        partial.rename(target)


def _serialise(variables: Tree) -> bytes:
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    arrays = {name: np.ascontiguousarray(value) for name, value in sorted(flat.items())}
    return safetensors.save(arrays)
