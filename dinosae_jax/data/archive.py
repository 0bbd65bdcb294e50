"""Conversion of an image set into ArrayRecord shards, without TensorFlow.

For sets that are read over a network or cropped again and again: a million small files become a
few large ones with random access. With `crop_size` ADM's centre crop is made once, with
`short_side` the reduction of large images, which is more than half of the loader's work. The
manifest says which, and training with another crop refuses the archive.
"""

from __future__ import annotations

import concurrent.futures
import functools
import io
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from dinosae_jax.data import crops, pixels
from dinosae_jax.data.manifest import MANIFEST, is_whole, read_manifest
from dinosae_jax.data.records import LARGEST_BAD_PART, Records, pack_record
from dinosae_jax.data.sources import open_records, with_synsets
from dinosae_jax.runtime import console, files

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read; the images are compressed
CHUNK = 256  # images that are read ahead

log = logging.getLogger(__name__)


def convert_images(
    source: str,
    output: str | os.PathLike,
    *,
    split: str = "train",
    crop_size: int = 0,
    short_side: int = 0,
    synsets: str = "",
    num_shards: int = 1,
    threads: int = 4,
    data_dir: str | None = None,
    holdout: int = 0,
) -> dict[str, Any]:
    """Writes one split of an image set to `output`/`split`, to be read as 'array_record:<output>'.

    Every image is decoded once; those that cannot be are left out, and listed in the manifest. A
    shard and the manifest get their names when they are complete; the same call again writes the
    shards that are missing or have another size, and no others.

    Args:
      source: the set, see `sources.open_records`, which has data_dir and holdout too.
      output: folder of the archive.
      split: 'train' or 'eval'.
      crop_size: side in pixels of ADM's centre crop, stored as PNG, or 0.
      short_side: pixels to which longer short sides are brought, stored as PNG, or 0. With neither
        of the two the image files' bytes are kept as they are.
      synsets: file that labels a split without class folders, see `sources.with_synsets`.
      num_shards: into how many files of about equal counts, at most one for each image.
      threads: for decoding and cropping.
      data_dir: tensorflow-datasets folder.
      holdout: part kept for 'eval'.

    Returns:
      The manifest: source, source_fingerprint, pixels, label_names, unlabelled, num_shards, count,
      and of each shard name, count, bytes, sha256 and the names of the images it lacks.

    Raises:
      ValueError: the source cannot be opened or labelled, the folder holds another conversion, or
        more than 1% of the images (but at least one) cannot be decoded.
    """
    if min(crop_size, short_side) < 0 or (crop_size and short_side):
        raise ValueError(
            "a conversion of a split crops to crop_size or reduces to short_side, or does neither; "
            f"got {crop_size} and {short_side}; set one of them to 0"
        )
    kind = "adm_center" if crop_size else "short_side" if short_side else "none"
    stored = pixels.record(kind, crop_size or short_side)
    records = open_records(source, split, data_dir=data_dir, holdout=holdout)
    if synsets:
        records = with_synsets(records, synsets)
    num_shards = min(num_shards, len(records))
    plan: dict[str, Any] = {
        "source": source,
        "source_fingerprint": records.fingerprint,
        "pixels": stored,
        "label_names": list(records.label_names),
        "unlabelled": records.unlabelled,
        "num_shards": num_shards,
    }
    folder = files.path(output) / split
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial_{MANIFEST}"
    shards = _finished_shards(folder, partial, plan)
    for number in range(num_shards):
        name = f"images-{number:05d}-of-{num_shards:05d}.array_record"
        if name not in shards:
            bounds = [len(records) * edge // num_shards for edge in (number, number + 1)]
            packed = _packed(records, range(*bounds), stored, threads)
            of = f"{split}: shard {number + 1} of {num_shards}, image"
            packed = console.progress(of, packed, bounds[1] - bounds[0], 1)
            shards[name] = _write_shard(folder / name, packed)
            _check_skipped(shards, len(records))
            files.write_json(partial, _manifest(plan, shards))
            console.report(f"{of}s: {shards[name]['count']}")
    manifest = _manifest(plan, shards)
    files.write_json(folder / MANIFEST, manifest)
    partial.unlink(missing_ok=True)
    return manifest


def _manifest(plan: dict[str, Any], shards: dict[str, Any]) -> dict[str, Any]:
    count = sum(shard["count"] for shard in shards.values())
    return plan | {"count": count, "shards": [shards[name] for name in sorted(shards)]}


def _finished_shards(
    folder: epath.Path, partial: epath.Path, plan: dict[str, Any]
) -> dict[str, Any]:
    """The shards by name that an earlier run of this conversion wrote and that are still whole."""
    path = next((path for path in (partial, folder / MANIFEST) if path.exists()), None)
    if path is None:
        return {}
    manifest = read_manifest(path)
    for key, value in plan.items():
        if manifest.get(key) != value:
            raise ValueError(
                f"a folder holds one conversion; got {folder}, which holds one with {key} "
                f"{str(manifest.get(key))[:80]!r} instead of {str(value)[:80]!r}; take another "
                "folder, or remove that one"
            )
    return {each["name"]: each for each in manifest["shards"] if is_whole(folder, each)}


def _write_shard(path: epath.Path, packed: Iterable[tuple[str, bytes | None]]) -> dict[str, Any]:
    """Writes one shard under a temporary name, renames it, and returns its manifest entry."""
    with files.publishing(path) as partial:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        count, skipped = 0, []
        for name, record in packed:
            if record is None:
                skipped.append(name)
            else:
                writer.write(record)
                count += 1
        writer.close()
        size, digest = partial.stat().st_size, files.file_sha256(partial)
    return {"name": path.name, "count": count, "bytes": size, "sha256": digest, "skipped": skipped}


def _packed(
    records: Records, indices: range, stored: dict[str, Any], threads: int
) -> Iterator[tuple[str, bytes | None]]:
    """Names and archive records of some images in order, None for one that cannot be decoded."""
    pack = functools.partial(_pack, records, stored)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), CHUNK):
            yield from pool.map(pack, indices[start : start + CHUNK])


def _pack(records: Records, stored: dict[str, Any], index: int) -> tuple[str, bytes | None]:
    name = records.name(index)
    try:
        encoded, label = records.read(index)
        image = crops.decode_rgb(encoded)
    except OSError as error:
        log.warning("left out an image that cannot be read: %s (%s)", name, error)
        return name, None
    if stored["crop"] == "adm_center":
        encoded = _png(crops.adm_center_crop(image, stored["size"]))
    elif stored["crop"] == "short_side" and min(image.shape[:2]) > stored["size"]:
        encoded = _png(crops.resize_short_side(image, stored["size"]))
    return name, pack_record(label, name, encoded)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_skipped(shards: dict[str, Any], total: int) -> None:
    skipped = [name for shard in shards.values() for name in shard["skipped"]]
    if len(skipped) > max(1, LARGEST_BAD_PART * total):
        raise ValueError(
            f"at most 1% of the images may be unreadable; got {len(skipped)} of {total}, the last "
            f"one {skipped[-1]}; remove or replace them"
        )
