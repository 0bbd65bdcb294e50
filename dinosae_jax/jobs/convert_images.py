"""Converts an image set into ArrayRecord shards, which training reads as array_record:WORKDIR."""

from __future__ import annotations

import jax
import ml_collections
from etils import epath

from dinosae_jax.data import archive
from dinosae_jax.runtime import console


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes each split to workdir/SPLIT; intact shards are kept.

    Args:
      config: source, data_dir, holdout, splits, crop_size, short_side, eval_synsets, num_shards,
        threads (configs/convert_images.py).
      folder: folder of the archive.

    Raises:
      ValueError: for a source that cannot be read, more than 1% damaged images, or a workdir that
        holds another conversion.
    """
    if jax.process_index() != 0:
        return
    for split in config.splits:
        short_side = config.short_side if split == "train" else 0
        manifest = archive.convert_images(
            config.source,
            folder,
            split=split,
            crop_size=0 if short_side else config.crop_size,
            short_side=short_side,
            synsets=config.eval_synsets if split == "eval" else "",
            num_shards=config.num_shards,
            threads=config.threads,
            data_dir=config.data_dir or None,
            holdout=config.holdout,
        )
        shards = manifest["shards"]
        skipped = sum(len(shard["skipped"]) for shard in shards)
        size = sum(shard["bytes"] for shard in shards)
        console.report(
            f"{config.name} {split}: {manifest['count']} images in {len(shards)} shards, "
            f"{size / 1e6:,.1f} MB, {skipped} left out as unreadable"
        )
    console.report(f"{config.name}: read it with --config.data.source=array_record:{folder}")
