"""Speed of the training loader, with its source or with JPEGs like photographs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from dinosae_jax.data import crops, images

JPEG_SIZE = (500, 375)  # width and height of a typical ImageNet photograph


def read_batches(loader: ml_collections.ConfigDict) -> float:
    """Images/s of the training loader with the config's source, crop and threads."""
    source = images.open_images(loader.data, "train")
    batches = images.train_batches(source, loader.data, batch_size=loader.batch_size, seed=0)
    next(batches)
    started = time.perf_counter()
    for _ in range(loader.batches):
        next(batches)
    return loader.batches * loader.batch_size / (time.perf_counter() - started)


def crop_jpegs(loader: ml_collections.ConfigDict) -> float:
    """Images/s of one core that decodes 500x375 JPEGs and cuts ADM's centre crop of 256 pixels."""
    encoded = synthetic_jpeg()
    started = time.process_time()
    for _ in range(loader.jpegs):
        crops.adm_center_crop(crops.decode_rgb(encoded), 256)
    return loader.jpegs / (time.process_time() - started)


def synthetic_jpeg() -> bytes:
    """A JPEG of quality 92 with structure at every scale, about 60 KB."""
    random = np.random.default_rng(0)
    image = np.zeros((JPEG_SIZE[1], JPEG_SIZE[0], 3))
    for cells in (4, 16, 64, 256):
        noise = random.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
        image += np.asarray(layer, np.float64) / cells**0.5
    scaled = 255 * (image - image.min()) / np.ptp(image)
    buffer = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_jpegs(folder: epath.Path, count: int) -> epath.Path:
    """Fills a folder with `count` synthetic JPEGs of one class for each split; returns it."""
    encoded = synthetic_jpeg()
    for split in ("train", "val"):
        class_folder = folder / split / "one"
        class_folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (class_folder / f"{number}.jpg").write_bytes(encoded)
    return folder


LOADERS: dict[str, Callable[[ml_collections.ConfigDict], float]] = {
    "photos, training batches": read_batches,
    "500x375 JPEG to ADM's crop, per core": crop_jpegs,
}
