"""Writing a latent cache: ArrayRecord shards, resumable, several processes side by side.

A folder holds `train` and `eval`, each with shards and a manifest. Process i of k writes the shards
whose number is i modulo k. A shard gets its name when it is complete, and beside it a JSON file of
what it holds; when every shard is there, these become the manifest. Threads pack, write and hash
behind the encoder; a shard has the same bytes with any number of them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
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
HASHING_THREADS = 2  # of whole shards; a sha256 takes as long as writing
BATCHES_AHEAD = 4  # handed over by the encoder and not written yet
# tokens float32 [b, v, n, d] (v: plain, flipped; b and v may be sequences) and labels int32 [b]
Encoded = tuple[Iterable[Any], NDArray[np.int32]]
Packed = tuple[NDArray[np.float64], list[bytes]]  # norms [v, n] and records of one image


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


class ShardWriter:
    """Writes shards behind the encoder: threads pack, one writes in order, two hash.

    Leaving the `with` block waits for every shard that was handed over whole, also after a signal.
    """

    def __init__(self, folder: epath.Path, plan: dict[str, Any], threads: int = 1):
        """Starts no thread before there is something to do.

        Args:
          folder: of one split, claimed.
          plan: see `claim`.
          threads: that pack records.
        """
        self._folder, self._plan = folder, plan
        self._packing = concurrent.futures.ThreadPoolExecutor(threads)
        self._writing = concurrent.futures.ThreadPoolExecutor(1)
        self._hashing = concurrent.futures.ThreadPoolExecutor(HASHING_THREADS)
        self._entries: list[concurrent.futures.Future[None]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for pool in (self._packing, self._writing, self._hashing):
            pool.shutdown()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raises what went wrong with the shards that were handed over, if anything did."""
        for entry in self._entries:
            if entry.done():
                entry.result()

    def write(self, number: int, encoded: Iterable[Encoded]) -> None:
        """Hands over one shard, which gets its name and its JSON file when it is on the disk.

        Raises:
          ValueError: tokens that are not finite, of this shard or (late) of an earlier one.
        """
        self.check()
        with contextlib.ExitStack() as stack:
            target = self._folder / shard_name(self._plan, number)
            partial = stack.enter_context(files.publishing(target))
            writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
            written: list[concurrent.futures.Future[NDArray[np.float64]]] = []
            waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
            for tokens, labels in encoded:
                packed = [
                    self._packing.submit(_pack, variants, int(label), self._plan["format"])
                    for variants, label in zip(tokens, labels, strict=True)
                ]
                written.append(self._writing.submit(_write, writer, packed))
                waiting.append(written[-1])
                if len(waiting) > BATCHES_AHEAD:
                    waiting.popleft().result()
            rest = (number, partial, writer, written, stack.pop_all())
            self._entries.append(self._hashing.submit(self._finish, *rest))

    def _finish(
        self,
        number: int,
        partial: pathlib.Path,
        writer: ArrayRecordWriter,
        written: list[concurrent.futures.Future[NDArray[np.float64]]],
        publishing: contextlib.ExitStack,
    ) -> None:
        """Closes, hashes and publishes a shard, and writes beside it what it holds."""
        moments = np.zeros(3)
        name = shard_name(self._plan, number)
        with publishing:
            for batch in written:
                moments += batch.result()
            writer.close()
            entry = {
                "name": name,
                "count": len(shard_range(self._plan, number)),
                "bytes": partial.stat().st_size,
                "sha256": files.file_sha256(partial),
                "norm_moments": moments.tolist(),
            }
        files.write_json(self._folder / f"{name}.json", entry)


def write_shard(
    folder: epath.Path, plan: dict[str, Any], number: int, encoded: Iterable[Encoded]
) -> None:
    """Writes one shard; see `ShardWriter`.

    Raises:
      ValueError: tokens that are not finite.
    """
    with ShardWriter(folder, plan) as writer:
        writer.write(number, encoded)


def _pack(variants: Sequence[NDArray[np.float32]], label: int, stored: str) -> Packed:
    norms = [latent_record.norms_of(variant) for variant in variants]
    records = [
        latent_record.pack(variant, label, stored, norm)
        for variant, norm in zip(variants, norms, strict=True)
    ]
    return np.stack(norms), records


def _write(
    writer: ArrayRecordWriter, packed: list[concurrent.futures.Future[Packed]]
) -> NDArray[np.float64]:
    """Writes one batch in its order; the moments of its norms: how many, sum, sum of squares."""
    images = [image.result() for image in packed]
    for _, records in images:
        for record in records:
            writer.write(record)
    norms = np.stack([image[0] for image in images])
    return np.array([norms.size, norms.sum(), (norms**2).sum()])


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
