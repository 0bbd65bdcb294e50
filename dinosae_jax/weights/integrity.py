"""Whether a checkpoint is as it was saved: a checksum of each array, a sha256 of each file.

The checksums are in a checkpoint's record, the sha256 of its files in its seal.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from etils import epath

from dinosae_jax.runtime import buckets, files, jit

Tree = Any
SEAL = "seal.json"  # in the folder of each checkpoint
COMMIT = "commit_success.txt"  # in a bucket, in the folder of each checkpoint
# What Orbax still changes when a checkpoint is sealed, and never reads for what we restore.
UNSEALED = (SEAL, "_CHECKPOINT_METADATA", COMMIT)


class Damaged(ValueError):
    """The bytes of a checkpoint are not those that were saved."""


def checksums(state: Tree) -> dict[str, int]:
    """A 32-bit checksum of the bits of each leaf, the same on any number of devices."""
    sums = jax.device_get([_compiled_checksum()(leaf) for leaf in jax.tree.leaves(state)])
    return {name: int(value) for name, value in zip(names(state), sums, strict=True)}


def digest(record: dict[str, Any]) -> str:
    """The sha256 of what JSON takes, such as a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@functools.cache
def _compiled_checksum() -> Callable[[jax.Array], jax.Array]:
    # A program a shape: the stages of a chain share them, one of all leaves they would not.
    return jit.jit_once(_checksum)


def _checksum(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
    # The position is mixed in, so that an exchange of two values is seen too.
    mixed = bits + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


def check_sums(state: Tree, expected: dict[str, int]) -> None:
    """Raises Damaged where arrays have other checksums than a record says."""
    found = checksums(state)
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    if wrong:
        raise Damaged(f"{len(wrong)} arrays differ from their checksums, first {wrong[0]}")


def names(tree: Tree) -> list[str]:
    """The name of each leaf, 'params/stem/...', in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def seal(folder: epath.Path) -> None:
    """Writes the sha256 of every file of a checkpoint into it."""
    found = hashes(folder)
    files.write_json(folder / SEAL, {"files": found, "sha256": digest(found)})


def check_seal(folder: epath.Path) -> None:
    """Compares the files of a sealed checkpoint with its seal, before native code reads them.

    Args:
      folder: `workdir/checkpoints/<step>`; nothing is compared where it has no seal.

    Raises:
      Damaged: where bytes are not those that were saved.
      OSError: where a file cannot be read.
    """
    sealed = read_seal(folder)
    if sealed is None:
        return
    others = changed(hashes(folder), sealed)
    if others:
        raise Damaged(
            f"a checkpoint has the bytes that were saved; got others in {folder / others[0]}; "
            "take it from where it came once more, or an earlier one"
        )


def changed(found: dict[str, str], sealed: dict[str, str]) -> list[str]:
    """Names of the sealed files that are missing or have another sha256, in the seal's order."""
    return [name for name, sha256 in sealed.items() if found.get(name) != sha256]


def read_seal(folder: epath.Path) -> dict[str, str] | None:
    """File -> sha256; None where the seal is missing or not as it was written."""
    try:
        with buckets.as_oserror(folder):
            content = json.loads((folder / SEAL).read_text())
        found = dict(content["files"])
        whole = content["sha256"] == digest(found)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return found if whole else None


def hashes(folder: epath.Path) -> dict[str, str]:
    """File -> sha256 of what a checkpoint holds; OSError where that is unreadable."""
    if buckets.is_bucket(folder):
        found = sorted(buckets.listing(folder))
    else:
        found = [
            os.path.relpath(os.path.join(place, name), folder)
            for place, _, inside in os.walk(folder, onerror=_raise)
            for name in sorted(inside)
        ]
    sealed = [name for name in found if os.path.basename(name) not in UNSEALED]
    sums = files.file_sha256s([folder / name for name in sealed])
    return dict(zip(sealed, sums, strict=True))


def _raise(error: OSError) -> NoReturn:
    raise error
