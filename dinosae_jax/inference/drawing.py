"""Series of samples in a folder, drawn in chunks: an interrupted series resumes where it stopped.

A folder holds config.json, labels.npy, images/ (PNG files, where asked for), chunks/ while the
series is drawn, and at the end samples.npz and DONE. Image i depends only on the seed, i and its
label. Files are written by threads while the next images are drawn.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax.data import adm_npz, png
from dinosae_jax.inference import batching
from dinosae_jax.inference.generator import Generator, random_generator
from dinosae_jax.runtime import agreement, console, files, lease, sharding, stopping
from dinosae_jax.weights import integrity

BALANCED_EACH = 50  # images per class, the usual 50,000 of ImageNet


# What a resumed run may change: how samples are computed, not which.
CONTINUABLE = ("batch_per_device", "chunk", "compile_cache")


def draw_series(config: ml_collections.ConfigDict, folder: epath.Path) -> Sequence[str]:
    """Draws what the config describes; finished chunks are kept. Returns the classes' names.

    Args:
      config: of `config.sample_defaults`.
      folder: folder of the images.

    Raises:
      ValueError: before compilation, for labels or settings that the flow cannot do, or a workdir
        that holds other samples.
      stopping.Interrupted: after a signal, with every finished chunk saved.
    """
    generator = open_generator(config)
    labels = generator.check_labels(
        choose_labels(config.labels, config.count, generator.num_classes, config.seed)
    )
    given = config.sampling.to_dict()
    settings = generator.settings(**given)
    if config.weaker and settings["guidance"] == 1.0:
        raise ValueError(
            "a weaker flow guides at a scale other than 1; got guidance=1 with "
            f"weaker={config.weaker!r}; pass --config.sampling.guidance=1.42, or leave it out"
        )
    with stopping.StopRequest(), lease.hold(folder):
        _draw_held(generator, config, labels, settings, folder)
    return generator.label_names


def _draw_held(
    generator: Generator,
    config: ml_collections.ConfigDict,
    labels: np.ndarray,
    settings: dict[str, Any],
    folder: epath.Path,
) -> None:
    claim(folder, config, generator)
    for note in generator.notes:
        console.report(f"{config.name}: {note}")
    if (folder / "DONE").exists():
        console.report(f"{config.name}: finished before, the images are in {folder}")
        return
    console.report(
        f"{config.name}: {len(labels)} images, "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
    )
    draw_chunks(generator, config, labels, folder)
    if jax.process_index() == 0:
        finish(folder, labels, config.chunk)
        console.report(f"{config.name}: wrote {folder / 'samples.npz'}")


def open_generator(config: ml_collections.ConfigDict) -> Generator:
    """The flow of `init_from`, guided by `weaker`, or random weights of `random_flow`."""
    if config.init_from:
        generator = Generator.load(config.init_from, config.dtype)
        if not config.weaker:
            return generator
        return generator.guided_by(Generator.load(config.weaker, config.dtype, generator.mesh))
    flow_config = config.random_flow.copy_and_resolve_references()
    flow_config.dtype = "float32"
    generator = random_generator(flow_config, sharding.make_mesh())
    generator.notes.append(
        "All networks are randomly initialised (init_from is empty): these images are meaningless."
    )
    return generator


def choose_labels(labels: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """The label of each sample.

    Args:
      labels: 'all' (0 to K-1), 'balanced' (the same 50 times), 'random' (uniform), or numbers
        joined by commas.
      count: above 0, the sequence is cut or repeated to this length.
      num_classes: K.
      seed: of the random labels.

    Returns:
      int64 [n].

    Raises:
      ValueError: for another word, 'random' without a count, or a count that is not balanced.
    """
    if labels == "random":
        if not count:
            raise ValueError("labels='random' needs a number of images; got count=0; set count")
        return np.random.default_rng(seed).integers(0, num_classes, count)
    if labels == "balanced" and count % num_classes:
        raise ValueError(
            f"labels='balanced' draws the same number of each class; got count={count} for "
            f"{num_classes} classes; take a multiple of it, or labels='random'"
        )
    if labels in ("all", "balanced"):
        natural = np.tile(np.arange(num_classes), BALANCED_EACH if labels == "balanced" else 1)
    else:
        try:
            natural = np.array([int(label) for label in labels.split(",") if label.strip()])
        except ValueError:
            raise ValueError(
                f"labels is balanced, all, random or numbers joined by commas; got {labels!r}; "
                "choose one of these"
            ) from None
    return np.resize(natural, count or len(natural))


def claim(folder: epath.Path, config: ml_collections.ConfigDict, generator: Generator) -> None:
    """Writes the config and the weights' checksums, or compares them with those in the folder.

    Raises:
      ValueError: where the workdir holds samples of another config or of other weights.
    """
    record = json.loads(config_lib.to_json(config))
    record["weights"] = {
        role: sum(integrity.checksums(generator.variables[role]).values()) % 2**32
        for role in generator.variables
    }
    path = folder / "config.json"
    if path.exists():
        saved = json.loads(path.read_text())
        ours, theirs = (
            {name: value for name, value in tree.items() if name not in CONTINUABLE}
            for tree in (record, saved)
        )
        lines = config_lib.differences(ours, theirs)
        if lines:
            raise ValueError(
                f"a folder holds one series of samples; got {folder} with another "
                f"({'; '.join(lines[:5])}); use another --workdir or delete it"
            )
        record["chunk"] = saved["chunk"]
        config.chunk = saved["chunk"]  # existing chunks have this length
    if jax.process_index() == 0:
        files.write_json(path, record)


def draw_chunks(
    generator: Generator,
    config: ml_collections.ConfigDict,
    labels: np.ndarray,
    folder: epath.Path,
) -> None:
    """Draws the images that are missing; a chunk is written while the next one is drawn."""
    start = first = first_missing(folder, len(labels), config.chunk)
    if start >= len(labels):
        return
    pictures = generator.pictures(
        labels[start:],
        key=jax.random.PRNGKey(config.seed),
        first_index=start,
        batch_size=min(config.batch_per_device * generator.mesh.size, len(labels)),
        **config.sampling.to_dict(),
    )
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as behind:
        writing = behind.submit(lambda: None)
        for images in batching.regroup(pictures, config.chunk):
            writing.result()
            if jax.process_index() == 0:
                writing = behind.submit(_write, folder, start, images, config.png)
            start += len(images)
            rate = (start - first) / (time.monotonic() - started)
            console.report(f"{config.name} {start}/{len(labels)}  {rate:.2f} images/s")
        writing.result()


def first_missing(folder: epath.Path, count: int, chunk: int) -> int:
    """Index of the first image that has to be drawn; the first process's files decide."""

    def look() -> int:
        start = 0
        while start < count and chunk_path(folder, start).exists():
            start += chunk
        return start

    return agreement.from_first(look)


def chunk_path(folder: epath.Path, start: int) -> epath.Path:
    """The file of the chunk that begins with image `start`."""
    return folder / "chunks" / f"{start:07d}.npy"


def _write(folder: epath.Path, start: int, images: np.ndarray, png_files: bool) -> None:
    if png_files:
        write_pngs(folder / "images", start, images)
    write_chunk(folder, start, images)


def write_pngs(folder: epath.Path, start: int, images: np.ndarray) -> None:
    """Writes uint8 images [b, h, w, 3] as PNG files numbered from `start`, on all cores."""
    folder.mkdir(exist_ok=True)

    def write(index: int) -> None:
        png.write_png(folder / f"{start + index:07d}.png", images[index], compress_level=1)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(len(images))))


def write_chunk(folder: epath.Path, start: int, images: np.ndarray) -> None:
    """Writes uint8 images [b, h, w, 3] as one file, which marks them as complete."""
    (folder / "chunks").mkdir(exist_ok=True)
    path = chunk_path(folder, start)
    with files.publishing(path) as partial:
        np.save(partial, images)


def finish(folder: epath.Path, labels: np.ndarray, chunk: int) -> None:
    """Writes samples.npz and labels.npy from the chunks, then removes the chunks."""
    paths = [chunk_path(folder, start) for start in range(0, len(labels), chunk)]
    adm_npz.write_images(folder / "samples.npz", map(_load, paths), len(labels))
    with files.publishing(folder / "labels.npy") as partial:
        np.save(partial, labels)
    files.write_json(folder / "DONE", {"images": len(labels)})
    epath.Path(folder / "chunks").rmtree()


def _load(path: epath.Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.load(file)
