"""The manifest of an archive: what its shards hold, their sizes and sha256."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from dinosae_jax.runtime import files

MANIFEST = "manifest.json"


def read_manifest(path: pathlib.Path, again: str = "the conversion") -> dict[str, Any]:
    """Returns a manifest; ValueError, which says to run `again`, where it is not readable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"an archive needs a readable {MANIFEST}, which is written at the very end; got "
            f"{path} ({error}); run {again} again, which writes what is missing"
        ) from error


def is_whole(folder: pathlib.Path, shard: dict[str, Any]) -> bool:
    """Whether a shard exists and has the size that its manifest entry states."""
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


def check_shards(
    folder: pathlib.Path,
    manifest: dict[str, Any],
    *,
    sha256: bool = False,
    again: str = "the conversion",
) -> None:
    """Compares an archive's shards with its manifest, by size, and by content on request.

    Raises:
      ValueError: a shard is missing or differs; the message names it.
    """
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        if not is_whole(folder, shard):
            raise ValueError(
                f"an archive's shards must be as its manifest says; got {path}, which is missing "
                f"or has not its {shard['bytes']} bytes; run {again} again, which repairs it"
            )
        if sha256 and files.file_sha256(path) != shard["sha256"]:
            raise ValueError(
                f"an archive's shards must be as its manifest says; got {path}, whose content has "
                f"changed; remove that file and run {again} again"
            )
