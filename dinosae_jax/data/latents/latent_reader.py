"""Batches of latents from a cache that `configs/encode.py` wrote (`latent_shards` is the writer).

The counterpart of `images` for training a flow: a batch depends on (seed, step) alone, has the
images and flips of the batch that `images.train_batches` makes of the same set, and is the same on
any number of processes. Only the record that is wanted is read, the plain or the flipped one, and
copied once, into its row of the batch. ArrayRecord checks a hash of every record that it reads.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax.data import pixels
from dinosae_jax.data.latents import latent_record
from dinosae_jax.data.manifest import (
    MANIFEST,
    check_form,
    check_shards,
    local_shards,
    read_manifest,
)
from dinosae_jax.data.order import Share, crop_generator, draw_flip, share_of, training_index
from dinosae_jax.data.records import fingerprint_of
from dinosae_jax.runtime import files, untrusted

HASHED_BYTES = 4 * 2**30  # caches up to this size are hashed whole when they are opened
AHEAD = 2  # batches
MAX_EXPANSION = 1000  # zeros compress so well
ENCODE = "configs/encode.py"
# The fields of the data config that decide which pixels were encoded.
IMAGE_FIELDS = ("source", "holdout", "crop", "image_size")


def image_recipe(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides which pixels are encoded; it travels with the cache.

    Args:
      data_config: `source`, `holdout`, `crop` and `image_size`.
    """
    stored = pixels.record("adm_center", data_config["image_size"])
    return {**{field: data_config[field] for field in IMAGE_FIELDS}, "pixels": stored}


def check_classes(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where a split numbers other classes than `train` beside it."""
    training = folder.parent / "train" / MANIFEST
    if training.exists():
        names = read_manifest(training, ENCODE)["label_names"]
        if names != manifest["label_names"]:
            raise ValueError(
                "the splits of a latent cache have training's classes; got "
                f"{len(manifest['label_names'])} in {folder} and {len(names)} in training, which "
                "differ; encode again into an empty folder"
            )


class LatentSource:
    """Random access to the latents of one split.

    Attributes:
      folder: of the split.
      manifest: of the cache.
      label_names: the classes' names in the order of the labels.
      num_classes: their number.
      fingerprint: hash of the shards' contents.
      fields: the arrays of a record.
    """

    def __init__(self, folder: epath.Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.label_names = tuple(manifest.get("label_names", ()))
        self.num_classes = len(self.label_names)
        self.fingerprint = fingerprint_of(shard["sha256"] for shard in manifest["shards"])
        self.fields = latent_record.layout(
            manifest["format"], manifest["tokens"], manifest["width"]
        )
        paths = [str(path) for path in local_shards(folder, manifest)]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return self.manifest["count"]

    def read_into(self, batch: Mapping[str, NDArray], row: int, index: int, flip: bool) -> None:
        """Copies the latent of one image into a row of a batch.

        Raises:
          ValueError: the record is damaged.
        """
        number = index * (1 + self.manifest["flipped"]) + flip
        try:
            record = self._records[number]
        except Exception as error:  # array_record has no class of its own
            reason = str(error).splitlines()[0][:200]
            raise ValueError(
                f"the records of a latent cache must be readable; got number {number} ({reason}); "
                f"run {ENCODE} again with the same --workdir, which repairs the damaged shard"
            ) from error
        latent_record.unpack_into(record, self.fields, batch, row)


def open_latents(data_config: Mapping[str, Any], split: str) -> LatentSource:
    """Opens one split of the cache in `latents` and compares it with the config's image recipe.

    Shards must have their sizes; up to `HASHED_BYTES` in all, also their sha256. (Larger caches
    are hashed by running configs/encode.py again; a damaged record is found when it is read.)

    Args:
      data_config: `latents`, and what the flow would encode: source, holdout, crop, image_size
        and flip.
      split: 'train' or 'eval'.

    Raises:
      ValueError: a missing or damaged cache, or one of other images.
    """
    folder = files.path(data_config["latents"]) / split
    manifest = read_manifest(folder / MANIFEST, ENCODE)
    recipe = manifest.get("images")
    recipe = recipe if isinstance(recipe, dict) else {}
    differing, flags = [], []
    for field, ours in image_recipe(data_config).items():
        theirs = recipe.get(field)
        if ours != theirs:
            shown = untrusted.short(theirs if isinstance(theirs, str) else repr(theirs))
            differing.append(f"data.{field}={shown}, where this config says {ours!r}")
            flags += [f"--config.data.{field}={shown}"] if field in IMAGE_FIELDS else []
    if split == "train" and data_config["flip"] and not manifest.get("flipped"):
        differing.append("no flipped images, where this config says data.flip=True")
        flags.append("--config.data.flip=False")
    if differing:
        way = f"pass {' '.join(flags)}, or encode again" if flags else "encode again"
        raise ValueError(
            "a latent cache must be of the images that the flow is to learn; got "
            f"{folder} with {'; '.join(differing)}; {way}"
        )
    check_classes(folder, manifest)
    check_form(folder, manifest, ENCODE)
    _check_sizes(folder, manifest)
    total = sum(shard["bytes"] for shard in manifest["shards"])
    check_shards(folder, manifest, sha256=total <= HASHED_BYTES, again=ENCODE)
    return LatentSource(folder, manifest)


def _check_sizes(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError where a manifest's records could not be in its shards."""
    sizes = [manifest.get(name) for name in ("count", "tokens", "width")]
    whole = all(type(size) is int and 0 < size < 1 << 40 for size in sizes)
    if not whole or type(manifest.get("flipped")) is not bool:
        raise ValueError(
            f"a latent cache says its count, tokens, width and flipped; got others in "
            f"{folder}; run {ENCODE} again"
        )
    fields = latent_record.layout(manifest.get("format", ""), manifest["tokens"], manifest["width"])
    needed = manifest["count"] * sum(field.nbytes for field in fields)
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    if needed > MAX_EXPANSION * stored:
        raise ValueError(
            f"records take at most {MAX_EXPANSION} times the bytes of their shards; got {needed} "
            f"bytes in {stored} of {folder}; run {ENCODE} again"
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Fills the rows of a batch, by several threads where there is a pool."""

    source: LatentSource
    share: Share
    pool: concurrent.futures.ThreadPoolExecutor | None

    def fill(self, wanted: list[tuple[int, int, bool]]) -> dict[str, NDArray]:
        """A batch of this process; `wanted` are (row, index, flip), other rows stay zero."""
        batch = latent_record.empty_batch(self.source.fields, self.share.local)
        batch["index"] = np.full(self.share.local, -1, np.int64)

        def read(one: tuple[int, int, bool]) -> None:
            row, index, flip = one
            self.source.read_into(batch, row, index, flip)
            batch["index"][row] = index

        list((self.pool.map if self.pool else map)(read, wanted))
        return batch


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    rows: _Rows
    seed: int
    flip: bool

    def __call__(self, step: int) -> dict[str, NDArray]:
        share, wanted = self.rows.share, []
        for row in range(share.local):
            position = share.position(int(step) * share.local + row)
            index = training_index(len(self.rows.source), self.seed, position)
            flip = self.flip and draw_flip(crop_generator(self.seed, position))
            wanted.append((row, index, flip))
        return self.rows.fill(wanted)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    rows: _Rows

    def __call__(self, step: int) -> dict[str, NDArray]:
        share = self.rows.share
        places = [share.position(int(step) * share.local + row) for row in range(share.local)]
        inside = [(row, place) for row, place in enumerate(places) if place < len(self.rows.source)]
        batch = self.rows.fill([(row, place, False) for row, place in inside])
        return batch | {"mask": batch["index"] >= 0}


def train_batches(
    source: LatentSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, NDArray]]:
    """Endless training batches, from the one that step `start_step` uses.

    Args:
      source: what `open_latents` returned.
      data_config: `flip`, and `threads` (reading threads, 0 for none).
      batch_size: of all processes together.
      seed: 0 <= seed < 2^32.
      start_step: the number of batches that come before.
      rows: int64 [b], ascending: which of a batch's rows this process reads; None for all.

    Returns:
      An iterator over {'label': int32 [b], 'index': int64 [b]} and the fields of the cache's
      format: 'latent' bfloat16 [b, n, d], or 'direction' int8 [b, n, d] and 'norm' float16 [b, n].

    Raises:
      ValueError: no rows, or (while iterating) a damaged record.
    """
    share = share_of(batch_size, rows)
    threads = int(data_config["threads"])
    batch = _TrainBatch(_rows(source, share, threads), seed, bool(data_config["flip"]))
    return _ahead(grain.MapDataset.range(start_step, sys.maxsize).map(batch), threads)


def eval_batches(
    source: LatentSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, NDArray]]:
    """One pass over a source in its order, without flips.

    Every process gets the same number of batches. The last is filled up with zeros of index -1 and
    mask False.

    Returns:
      An iterator like that of `train_batches`, with 'mask': bool [b] besides.
    """
    share = share_of(batch_size, rows)
    threads = int(data_config["threads"])
    batch = _EvalBatch(_rows(source, share, threads))
    return _ahead(grain.MapDataset.range(-(-len(source) // batch_size)).map(batch), threads)


def _rows(source: LatentSource, share: Share, threads: int) -> _Rows:
    pool = concurrent.futures.ThreadPoolExecutor(threads) if threads else None
    return _Rows(source, share, pool)


def _ahead(batches: grain.MapDataset, threads: int) -> Iterator[dict[str, NDArray]]:
    """Reads whole batches, `AHEAD` of them before they are asked for."""
    ahead = AHEAD if threads else 0
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    return iter(batches.to_iter_dataset(options))
