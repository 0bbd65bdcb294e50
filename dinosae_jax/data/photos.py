"""The embedded photo set: ten photographs that scikit-image and scikit-learn install.

A tensorflow-datasets builder, so that the photos are read exactly as ImageNet is: `prepare` writes
ArrayRecord files once, `tfds.data_source('photos/112', split='train')` reads them. No network: the
files lie inside the installed wheels. The label is the photo.

A strip at the right end (or the bottom, where the photo is tall) of each photo is cut off before
any resizing. Split 'train' holds the ten remaining parts, their short side resized to the number
in the config's name; split 'eval' holds square tiles cut from the strips alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dinosae_jax import rules
from dinosae_jax.data import crops

FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "stereo_motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
STRIP = 0.3  # part of the long side that is kept out of training
TILES = {72: 64, 112: 64, 256: 128}  # short side of the training part: side of the eval tiles


def photo_path(name: str) -> pathlib.Path:
    """Where the installed package keeps the photo; ValueError where it is not installed."""
    package, relative = FILES[name]
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the embedded photos need the package {package}; got no such package; run "
            "pip install scikit-image scikit-learn"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        raise ValueError(
            f"the embedded photo {name} must be installed; got nothing at {path} in this release "
            f"of {package}; use scikit-image 0.25-0.26 and scikit-learn 1.6-1.9"
        )
    return path


def split_boxes(height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """The disjoint (rows, columns) of a photo that feed the splits 'train' and 'eval'."""
    if width >= height:
        edge = width - round(STRIP * width)
        return {
            "train": (slice(0, height), slice(0, edge)),
            "eval": (slice(0, height), slice(edge, width)),
        }
    edge = height - round(STRIP * height)
    return {
        "train": (slice(0, edge), slice(0, width)),
        "eval": (slice(edge, height), slice(0, width)),
    }


def cut_tiles(strip: np.ndarray, side: int) -> list[np.ndarray]:
    """Resizes the strip's short side to `side`, cuts the tiles uint8 [side, side, 3] that fit."""
    strip = crops.resize_short_side(strip, side)
    return [
        strip[top : top + side, left : left + side]
        for top in range(0, strip.shape[0] - side + 1, side)
        for left in range(0, strip.shape[1] - side + 1, side)
    ]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class Photos(tfds.core.GeneratorBasedBuilder):
    """Builder of 'photos/72', 'photos/112' and 'photos/256' (the short side of the train part)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and form that tensorflow-datasets reads)
        tfds.core.BuilderConfig(name=str(side), description=f"short side {side} pixels")
        for side in TILES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(FILES)),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "eval")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        side = int(self.builder_config.name)
        key = 0
        for name in FILES:
            photo = crops.decode_rgb(photo_path(name).read_bytes())
            part = photo[split_boxes(*photo.shape[:2])[split]]
            if split == "train":
                images = [crops.resize_short_side(part, side)]
            else:
                images = cut_tiles(part, TILES[side])
            for image in images:
                yield key, {"image": _png(image), "label": name}
                key += 1


def prepare(data_dir: str | os.PathLike | None = None, config: str = "112") -> str:
    """Writes the ArrayRecord files of one config where they are missing; returns the folder.

    The files are built in a folder of their own and renamed when complete, so a killed build
    leaves nothing that could be read, and of two processes at once the first to finish wins.

    Args:
      data_dir: tensorflow-datasets folder; None takes $TFDS_DATA_DIR or ~/tensorflow_datasets.
      config: the short side in pixels, a key of `TILES`.

    Returns:
      The tensorflow-datasets folder that holds photos/<config>.

    Raises:
      ValueError: there is no such config, a package that brings photos is not installed, or the
        folder cannot be written.
    """
    if config not in {str(side) for side in TILES}:
        raise ValueError(
            f"the photo set comes at short side {sorted(TILES)}; got photos/{config}; "
            "take one of these"
        )
    rules.require_local("data.data_dir of the embedded photos", str(data_dir or ""))
    root = pathlib.Path(data_dir or default_data_dir())
    final = root / "photos" / config / str(Photos.VERSION)
    if final.exists():
        return str(root)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the photo set needs a folder to be written to; got {final.parent} "
            f"({error.strerror}); name another in data.data_dir or TFDS_DATA_DIR"
        ) from error
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as building:
        builder = Photos(config=config, data_dir=building, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce the temporary folder
            builder.download_and_prepare()
        try:
            os.rename(builder.data_path, final)
        except OSError:
            if not final.exists():  # otherwise another process was first; its files are the same
                raise
    return str(root)


def default_data_dir() -> str:
    """The folder that tensorflow-datasets uses by convention."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
