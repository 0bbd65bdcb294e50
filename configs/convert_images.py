"""An image set as a few large files with random access (ArrayRecord), without TensorFlow.

For sets that are read over a network or cropped in every epoch. Each split becomes
WORKDIR/SPLIT/images-*.array_record with manifest.json: labels, and of each shard count, size,
sha256 and the images that could not be read. Stopped, the same command writes what is missing.

    python -m dinosae_jax.main --config=configs/convert_images.py --workdir=data/imagenet256 \
        --config.source='tar:imagenet/{split}*.tar' --config.crop_size=256

`source` is 'folder:PATH', 'tar:PATTERN', 'tfds:NAME' or 'photos/112'. `crop_size=256` stores ADM's
centre crop as PNG (lossless; training then needs data.crop=center and saves more than half of the
loader's work), 0 the image files as they are. Variants: tiny (the embedded photographs).
"""

from __future__ import annotations

import ml_collections

from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {"source": "photos/112", "crop_size": 64, "num_shards": 2, "threads": 2},
}


def get_config(argument=None):
    """The conversion of `source`; variants: tiny."""
    config = ml_collections.ConfigDict(
        dict(
            job="convert_images",
            name="convert_images",
            source="",
            data_dir="",  # of tensorflow-datasets
            splits=("train", "eval"),
            holdout=0,  # n: every n-th image of a set without splits is for evaluation
            crop_size=0,  # pixels
            num_shards=64,  # a split
            threads=16,
            compile_cache="",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
