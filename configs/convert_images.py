"""An image set as a few large files with random access (ArrayRecord), without TensorFlow.

For sets that are read over a network or cropped in every epoch. Each split becomes
WORKDIR/SPLIT/images-*.array_record with manifest.json: labels, what was done to the pixels, and of
each shard count, size, sha256 and the images that could not be read. Stopped, the same command
writes what is missing. ImageNet as it is published, for the stages of the autoencoder:

    python -m dinosae_jax.main --config=configs/convert_images.py:sae --workdir=data/imagenet \
        --config.source='tar:ILSVRC2012_img_{split}.tar' --config.eval_synsets=val_synsets.txt

`source` is 'folder:PATH', 'tar:PATTERN', 'tfds:NAME' or 'photos/112'. `eval_synsets` labels a
validation split without class folders: a text file with the synset of one image in each line, in
the order of the images' names (tensorflow-datasets installs ImageNet's as
datasets/imagenet2012/validation_labels.txt). Without it such a split serves an autoencoder, and is
refused where labels are needed.

By default the image files are kept as they are, which suits every config. `short_side` reduces
training images whose short side is longer, for data.crop='resize_random' and data.resize of the
same size; `crop_size` stores ADM's centre crop (of the split eval alone where short_side is given),
for evaluation and data.crop='center' at that image_size. Both store PNG (lossless). Training that
asks for other pixels refuses the archive.

Variants: sae (stages 1 to 4: short_side=384, crop_size=256), flow (crop_size=256, for encode and
for flows on images), tiny (the embedded photographs).
"""

from __future__ import annotations

import ml_collections

from dinosae_jax import config as config_lib

VARIANTS = {
    "sae": {"short_side": 384, "crop_size": 256},
    "flow": {"crop_size": 256},
    "tiny": {"source": "photos/112", "crop_size": 64, "num_shards": 2, "threads": 2},
}


def get_config(argument=None):
    """The conversion of `source`; variants: sae, flow, tiny."""
    config = ml_collections.ConfigDict(
        dict(
            job="convert_images",
            name="convert_images",
            source="",
            data_dir="",  # of tensorflow-datasets
            splits=("train", "eval"),
            holdout=0,  # n: every n-th image of a set without splits is for evaluation
            short_side=0,  # pixels, of training images; 0 keeps them
            crop_size=0,  # pixels; 0 keeps the files as they are
            eval_synsets="",  # file with the class of each image of a flat split eval
            num_shards=64,  # of each split
            threads=16,
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, VARIANTS)
