"""Image sources and the batches of training and evaluation.

A batch depends on (seed, step) alone: the order of each epoch is a permutation drawn from the
seed, crops and flips are drawn from (seed, position in the global order), and a process reads its
own rows of each global batch. So nothing about the position has to be saved, and the global batches
are the same on any number of processes, threads and workers.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from dinosae_jax import names
from dinosae_jax.data import crops, pixels
from dinosae_jax.data.order import Share, crop_generator, share_of, training_index
from dinosae_jax.data.records import LARGEST_BAD_PART, Records
from dinosae_jax.data.sources import open_records, require_labels

CACHE_BYTES = 512 * 2**20  # sets that seem to fit here by their first image are kept decoded

log = logging.getLogger(__name__)


class ImageSource:
    """Random access to the decoded images of one split.

    An image that cannot be read is replaced by the next readable one (in the order of the
    indices), named in the log and counted. Once more than 1% of the images (but at least one) have
    turned out unreadable, reading raises ValueError. An image that is smaller than the crop is
    enlarged wherever it stands, and the first of these is named in the log.

    Attributes:
      label_names: the classes' names in the order of the labels.
      num_classes: their number.
      fingerprint: hash of what the set is made of (names and sizes of the files).
    """

    def __init__(self, records: Records, crop_side: int = 0):
        self._records = records
        self._crop_side = crop_side  # smaller images are named, the first of them
        self.label_names = records.label_names
        self.num_classes = len(records.label_names)
        self.fingerprint = records.fingerprint
        self._bad: set[int] = set()
        self._cache: dict[int, tuple[np.ndarray, int]] = {}
        self._room = 0
        if len(records) * self[0]["image"].nbytes <= CACHE_BYTES:
            self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image uint8 [h, w, 3], its label int32, and the index int64 that was really read."""
        wanted = index
        while (found := self._load(index)) is None:
            index = (index + 1) % len(self)
            if index == wanted:
                raise ValueError(
                    f"an image source must hold readable images; got {len(self)} images of which "
                    f"none can be read, not even {self.name(index)}; check the files"
                )
        image, label = found
        return {"image": image, "label": np.int32(label), "index": np.int64(index)}

    def __getstate__(self) -> dict[str, Any]:
        cached = sum(image.nbytes for image, _ in list(self._cache.values()))
        return self.__dict__ | {"_cache": {}, "_room": self._room + cached}

    @property
    def skipped(self) -> int:
        """How many different images could not be read so far, in this process."""
        return len(self._bad)

    def examples(self, labels: Iterable[int], tries: int = 2000) -> dict[int, np.ndarray]:
        """An image of each class, uint8 [h, w, 3] by label, where one is among `tries` of them."""
        wanted, found = set(labels), {}
        for index in np.random.default_rng(0).permutation(len(self))[:tries]:
            if wanted and self._records.read(int(index))[1] in wanted:
                example = self[int(index)]
                found[int(example["label"])] = example["image"]
                wanted -= found.keys()
        return found

    def name(self, index: int) -> str:
        """The file (or record) of an image, for messages."""
        return self._records.name(index)

    def _load(self, index: int) -> tuple[np.ndarray, int] | None:
        if index in self._bad:
            return None
        if index in self._cache:
            return self._cache[index]
        try:
            encoded, label = self._records.read(index)
            loaded = crops.decode_rgb(encoded), label
        except OSError as error:
            self._report_bad(index, error)
            return None
        self._report_small(index, loaded[0])
        if loaded[0].nbytes <= self._room:
            self._room -= loaded[0].nbytes
            self._cache[index] = loaded
        return loaded

    def _report_small(self, index: int, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        if min(height, width) < self._crop_side:
            log.warning(
                "enlarges images that are smaller than the crop of %d pixels, as %s of %d x %d",
                *(self._crop_side, self.name(index), width, height),
            )
            self._crop_side = 0

    def _report_bad(self, index: int, error: OSError) -> None:
        self._bad.add(index)
        allowed = max(1, int(LARGEST_BAD_PART * len(self)))
        log.warning(
            "skipped an image that cannot be read: %s (%s); %d so far, at most %d may be",
            *(self.name(index), error, len(self._bad), allowed),
        )
        if len(self._bad) > allowed:
            raise ValueError(
                f"at most 1% of the images may be unreadable; got {len(self._bad)} of {len(self)}, "
                f"the last one {self.name(index)} ({error}); remove or replace them"
            )


@dataclasses.dataclass(frozen=True)
class CropRecipe:
    """How a decoded image becomes a square: the part of the data config that changes pixels.

    Attributes:
      image_size: side of the square in pixels.
      crop: 'random' cuts it from the image as it is, 'center' is ADM's centre crop,
        'resize_random' brings the short side to `resize` first (RAE's augmentation),
        'random_resized' cuts a random part and resizes it (the linear probe's).
      resize: pixels, used by 'resize_random' alone.
      flip: mirror half of the training images.
    """

    image_size: int
    crop: str
    resize: int
    flip: bool

    def train(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A training crop, uint8 [s, s, 3]."""
        if self.crop == "center":
            image = crops.adm_center_crop(image, self.image_size)
        elif self.crop == "random_resized":
            image = crops.random_resized_crop(image, self.image_size, rng)
        else:
            short_side = self.resize if self.crop == "resize_random" else 0
            image = crops.random_crop(image, self.image_size, rng, short_side)
        return crops.flip(image, rng) if self.flip else image

    def evaluate(self, image: np.ndarray) -> np.ndarray:
        """The evaluation crop, uint8 [s, s, 3]: ADM's, whatever the training crop is."""
        return crops.adm_center_crop(image, self.image_size)

    def pixels(self, split: str) -> dict[str, Any]:
        """What stored images must be for a crop of them to be this recipe's (`pixels.record`)."""
        if split == "eval" or self.crop == "center":
            return pixels.record("adm_center", self.image_size)
        if self.crop == "resize_random":
            return pixels.record("short_side", self.resize)
        return pixels.record("none", 0)


def recipe_of(data_config: Mapping[str, Any]) -> CropRecipe:
    """The checked crop recipe of a data config; ValueError names a wrong field."""
    recipe = CropRecipe(
        image_size=int(data_config["image_size"]),
        crop=data_config["crop"],
        resize=int(data_config.get("resize") or 0),
        flip=bool(data_config.get("flip", False)),
    )
    if recipe.crop not in get_args(names.Crop):
        raise ValueError(
            f"data.crop is one of {', '.join(get_args(names.Crop))}; got {recipe.crop!r}; take one "
            "of these"
        )
    if recipe.image_size < 1:
        raise ValueError(f"data.image_size must be positive; got {recipe.image_size}; raise it")
    if recipe.crop == "resize_random" and recipe.resize < recipe.image_size:
        raise ValueError(
            "data.crop='resize_random' needs data.resize >= data.image_size; got resize "
            f"{recipe.resize} and image_size {recipe.image_size}; change one of them"
        )
    return recipe


def open_images(
    data_config: Mapping[str, Any], split: str, *, labelled: bool = False
) -> ImageSource:
    """Opens one split of the config's image source and decodes its first image.

    Args:
      data_config: `source` (see `sources.open_records`), `data_dir` (or None), the crop fields of
        `CropRecipe`, and `holdout` (optional, see `sources.open_records`).
      split: 'train' or 'eval'.
      labelled: whether the labels are used.

    Raises:
      ValueError: the source cannot be opened, holds other pixels than the crops are cut from, or
        lacks the labels.
    """
    recipe = recipe_of(data_config)
    records = open_records(
        data_config["source"],
        split,
        data_dir=data_config.get("data_dir") or None,
        holdout=data_config.get("holdout") or 0,
    )
    if labelled:
        require_labels(records, f"{data_config['source']} ({split})")
    crop = f"data.crop={recipe.crop!r}" if split == "train" else "evaluation"
    title = f"{data_config['source']} ({split})"
    pixels.check(records.pixels, recipe.pixels(split), title, crop)
    return ImageSource(records, recipe.image_size)


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    source: ImageSource
    recipe: CropRecipe
    share: Share
    seed: int

    def __call__(self, counter: int) -> dict[str, Any]:
        position = self.share.position(int(counter))
        example = self.source[training_index(len(self.source), self.seed, position)]
        rng = crop_generator(self.seed, position)
        return example | {"image": self.recipe.train(example["image"], rng)}


@dataclasses.dataclass(frozen=True)
class _EvalExample:
    source: ImageSource
    recipe: CropRecipe
    share: Share

    def __call__(self, counter: int) -> dict[str, Any]:
        index = self.share.position(int(counter))
        if index >= len(self.source):
            side = self.recipe.image_size
            image, label = np.zeros((side, side, 3), np.uint8), np.int32(0)
            return {"image": image, "label": label, "index": np.int64(-1), "mask": np.bool_(False)}
        example = self.source[index]
        mask = np.bool_(example["index"] == index)  # a stand-in for an unreadable image is not one
        return example | {"image": self.recipe.evaluate(example["image"]), "mask": mask}


def train_batches(
    source: ImageSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, from the one that step `start_step` uses.

    Args:
      source: what `open_images` returned.
      data_config: the crop fields of `CropRecipe`, `threads` (reading threads, 0 for none) and
        `workers` (processes, 0 for none; absl flags must be parsed).
      batch_size: of all processes together.
      seed: 0 <= seed < 2^32.
      start_step: the number of batches that come before.
      rows: int64 [b], ascending: which of a batch's rows this process reads; None for all.

    Returns:
      An iterator over {'image': uint8 [b, s, s, 3], 'label': int32 [b], 'index': int64 [b]}, b the
      batch of this process.

    Raises:
      ValueError: no rows, or (while iterating) too many unreadable images.
    """
    share = share_of(batch_size, rows)
    example = _TrainExample(source, recipe_of(data_config), share, seed)
    counters = grain.MapDataset.range(start_step * share.local, sys.maxsize)
    return _batches(counters.map(example), data_config, share.local)


def eval_batches(
    source: ImageSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a source in its order, by ADM's centre crop.

    Every process gets the same number of batches. The last is filled up with black images of
    index -1; these, and stand-ins for unreadable images, have mask False.

    Returns:
      An iterator like that of `train_batches`, with 'mask': bool [b] besides.
    """
    share = share_of(batch_size, rows)
    example = _EvalExample(source, recipe_of(data_config), share)
    steps = -(-len(source) // batch_size)
    counters = grain.MapDataset.range(steps * share.local)
    return _batches(counters.map(example), data_config, share.local)


def range_batches(
    source: ImageSource, data_config: Mapping[str, Any], indices: range, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """The evaluation crops of a range of images in their order, the last batch may be shorter.

    A stand-in takes the place of an unreadable image, as in training.

    Returns:
      An iterator over {'image': uint8 [b, s, s, 3], 'label': int32 [b], 'index': int64 [b]}.
    """
    recipe = recipe_of(data_config)

    def example(index: int) -> dict[str, Any]:
        found = source[int(index)]
        return found | {"image": recipe.evaluate(found["image"])}

    examples = grain.MapDataset.range(indices.start, indices.stop).map(example)
    return _batches(examples, {**data_config, "workers": 0}, batch_size, drop_remainder=False)


def _batches(
    examples: grain.MapDataset,
    data_config: Mapping[str, Any],
    batch_size: int,
    drop_remainder: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads examples by threads (and worker processes), in order, and stays one batch ahead."""
    threads, workers = int(data_config.get("threads", 2)), int(data_config.get("workers", 0))
    # Examples that are being read or wait for their turn: no thread is idle, whatever the batch.
    ahead = 2 * max(batch_size, threads) if threads else 0
    dataset = examples.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        dataset = dataset.mp_prefetch(options)
    dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
    if threads:
        dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
    return iter(dataset)
