"""Writing a latent cache: ArrayRecord shards, resumable, several processes side by side.

A folder holds `train` and `eval`, each with shards and a manifest. Process i of k writes the shards
whose number is i modulo k. A shard gets its name when it is complete, and beside it a JSON file of
what it holds; when every shard is there, these become the manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from numpy.typing import NDArray

from dinosae_jax.data.latents import latent_record
from dinosae_jax.data.manifest import MANIFEST, is_whole, read_manifest
from dinosae_jax.runtime import files

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read; noise does not compress
SHARD_BYTES = 2**30
PLAN = "plan.json"
# tokens float32 [b, v, n, d] (v: plain, flipped) and labels int32 [b]
Encoded = tuple[NDArray[np.float32], NDArray[np.int32]]


def shard_count(count: int, flipped: bool, stored: str, tokens: int, width: int) -> int:
    """Into how many shards of about 1 GiB a cache of `count` images is cut."""
    record = sum(field.nbytes for field in latent_record.layout(stored, tokens, width))
    return min(count, math.ceil(count * (1 + flipped) * record / SHARD_BYTES))


def shard_name(plan: dict[str, Any], number: int) -> str:
    """The file of a shard."""
    return f"latents-{number:05d}-of-{plan['num_shards']:05d}.array_record"


def shard_range(plan: dict[str, Any], number: int) -> range:
    """The images of a shard, by their indices in the image set."""
    edges = (plan["count"] * edge // plan["num_shards"] for edge in (number, number + 1))
    return range(*edges)


def claim(folder: epath.Path, plan: dict[str, Any]) -> None:
    """Makes the folder this cache's, or compares the cache that it holds with `plan`.

    Args:
      folder: of one split.
      plan: everything about the cache that its shards have in common, JSON-like.

    Raises:
      ValueError: it holds another cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = next((folder / name for name in (MANIFEST, PLAN) if (folder / name).exists()), None)
    if path is None:
        files.write_json(folder / PLAN, plan)
        return
    there = read_manifest(path)
    for key, value in plan.items():
        if there.get(key) != value:
            raise ValueError(
                f"a folder holds one latent cache; got {folder}, which holds one with {key} "
                f"{str(there.get(key))[:80]} instead of {str(value)[:80]}; take another --workdir, "
                "or remove that folder"
            )


def missing_shards(
    folder: epath.Path, plan: dict[str, Any], process_index: int = 0, process_count: int = 1
) -> list[int]:
    """Returns the shards of this process that lack the sha256 that they had when written."""
    entries = _entries(folder, plan)
    mine = range(process_index, plan["num_shards"], process_count)
    return [number for number in mine if not _is_good(folder, entries.get(number))]


def write_shard(
    folder: epath.Path, plan: dict[str, Any], number: int, encoded: Iterable[Encoded]
) -> None:
    """Writes one shard under a temporary name, renames it, and writes beside it what it holds.

    Raises:
      ValueError: tokens that are not finite.
    """
    name = shard_name(plan, number)
    with files.publishing(folder / name) as partial:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        moments = np.zeros(3)  # of the norms: how many, sum, sum of squares
        for tokens, labels in encoded:
            norms = latent_record.norms_of(tokens)
            moments += norms.size, norms.sum(), (norms**2).sum()
            for record in _records(tokens, labels, plan["format"]):
                writer.write(record)
        writer.close()
        entry = {
            "name": name,
            "count": len(shard_range(plan, number)),
            "bytes": partial.stat().st_size,
            "sha256": files.file_sha256(partial),
            "norm_moments": moments.tolist(),
        }
    files.write_json(folder / f"{name}.json", entry)


def finish(folder: epath.Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a cache whose shards are complete.

    Returns:
      The manifest: the plan, `shards` (name, count, bytes, sha256, norm_moments) and `norms`
      (mean, deviation and number of the tokens' norms: the decode radius is their mean).

    Raises:
      ValueError: a shard is missing.
    """
    entries = _entries(folder, plan)
    absent = [number for number in range(plan["num_shards"]) if number not in entries]
    if absent:
        raise ValueError(
            f"a latent cache is finished when every shard is written; got {folder}, which lacks "
            f"number {absent[0]}; run configs/encode.py again, and let every host see that folder"
        )
    shards = [entries[number] for number in range(plan["num_shards"])]
    count, total, squares = np.sum([shard["norm_moments"] for shard in shards], axis=0)
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean**2, 0.0))
    norms = {"mean": mean, "deviation": deviation, "tokens": int(count)}
    manifest = plan | {"norms": norms, "shards": shards}
    files.write_json(folder / MANIFEST, manifest)
    for leftover in (PLAN, *(f"{shard['name']}.json" for shard in shards)):
        (folder / leftover).unlink(missing_ok=True)
    return manifest


def _records(
    tokens: NDArray[np.float32], labels: NDArray[np.int32], stored: str
) -> Iterator[bytes]:
    for variants, label in zip(tokens, labels, strict=True):
        for variant in variants:
            yield latent_record.pack(variant, int(label), stored)


def _entries(folder: epath.Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What each written shard holds, by its number."""
    names = {shard_name(plan, number): number for number in range(plan["num_shards"])}
    found = {}
    if (folder / MANIFEST).exists():
        found = {
            names[shard["name"]]: shard for shard in read_manifest(folder / MANIFEST)["shards"]
        }
    for name in files.names_in(folder):
        if name.startswith("latents-") and name.endswith(".json"):
            found[names[name.removesuffix(".json")]] = json.loads((folder / name).read_text())
    return found


def _is_good(folder: epath.Path, entry: dict[str, Any] | None) -> bool:
    if entry is None or not is_whole(folder, entry):
        return False
    return files.file_sha256(folder / entry["name"]) == entry["sha256"]
