"""Parameters of one role as one file: frozen networks and exports.

A role is stored as `<role>-<sha256[:16]>.safetensors`, its leaves under their paths joined by
'/'. The full sha256 travels in whatever refers to the file and is compared when it is read.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from dinosae_jax.runtime import files, untrusted

Tree = Any


class RoleFile(NamedTuple):
    """Where a role is stored: the file's name inside its folder, and its sha256 in hex."""

    name: str
    sha256: str


def write(folder: epath.Path, role: str, variables: Tree) -> RoleFile:
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
        files.write_bytes(target, data)
    return file


def read(folder: epath.Path, file: RoleFile) -> Tree:
    """Reads a role back and checks its content.

    The arrays are windows of the file's bytes: reading takes twice its size.

    Args:
      folder: the file lies in it, not elsewhere by its name or by a link.
      file: from a record, which a stranger may have written.

    Raises:
      ValueError: where the file is missing, its sha256 is another one, or it is no role.
    """
    put_back = "put the original back"
    path = untrusted.inside(folder, file.name, put_back)
    if not path.is_file():
        raise ValueError(f"a record's files lie beside it; got no file {path}; {put_back}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{path} must be the file that was saved, of sha256 "
            f"{untrusted.short(file.sha256, 16)}; got one of {found[:16]}; {put_back}"
        )
    try:
        arrays = safetensors.load(data)
        inner = {name.rsplit("/", 1)[0] for name in arrays if "/" in name}
        if not arrays or inner & arrays.keys():
            raise LookupError("no arrays, or an array below another")
        return traverse_util.unflatten_dict(arrays, sep="/")
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the arrays of a role; got {untrusted.short(error)}; {put_back}"
        ) from None


def file_from(entry: object, record: epath.Path) -> RoleFile:
    """The file of a role as a record lists it: [name, sha256].

    Raises:
      ValueError: where the entry is something else.
    """
    if isinstance(entry, list | tuple) and len(entry) == 2:
        name, digest = entry
        if isinstance(name, str) and isinstance(digest, str):
            return RoleFile(name, digest)
    raise ValueError(
        f"{record} lists each role as [file, sha256]; got {untrusted.short(repr(entry))}; take the "
        "folder from where it came once more"
    )


def sha256(variables: Tree) -> str:
    """The sha256 that `write` would name, without writing: the identity of a network's weights."""
    return hashlib.sha256(_serialise(variables)).hexdigest()


def link(source: epath.Path, folder: epath.Path) -> None:
    """Makes a role file appear in another folder, without a second copy where that is possible."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        files.write_bytes(target, source.read_bytes())


def _serialise(variables: Tree) -> bytes:
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    arrays = {name: np.ascontiguousarray(value) for name, value in sorted(flat.items())}
    return safetensors.save(arrays)
