"""Reconstructs images: side-by-side PNG files, and PSNR, SSIM and LPIPS of each and in total.

The workdir holds images/ (original left, reconstruction right) and results.json. The metrics are
those of the 8-bit reconstruction in the PNG file. Images are processed in groups of one size,
because each size is compiled once.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax import names
from dinosae_jax.data import crops, png, sources
from dinosae_jax.data.records import Records
from dinosae_jax.eval import image_quality
from dinosae_jax.eval.protocols import inputs
from dinosae_jax.inference import batching
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models import autoencoder as autoencoder_lib
from dinosae_jax.models.lpips import LPIPS
from dinosae_jax.report import pictures
from dinosae_jax.runtime import console, files
from dinosae_jax.weights import weight_source

Image = NDArray[np.uint8]  # [height, width, 3]
Row = dict[str, Any]

PSNR, SSIM, CONVERSION = "rae", "rae", "truncate"  # names of eval.image_quality
SOURCE_KINDS = ("photos/", "tfds:", "folder:", "tar:", "array_record:")
UNITS = {"psnr": "dB", "ssim": "", "lpips": ""}


class Survey(NamedTuple):
    """The sizes of a set of images, and which of them are usable.

    Attributes:
      groups: (height, width) after cropping -> indices of its images, in the order of the set.
      uncropped: (height, width) before cropping, by index.
      skipped: images that cannot be used, {"name", "reason"}.
    """

    groups: dict[tuple[int, int], list[int]]
    uncropped: dict[int, tuple[int, int]]
    skipped: list[dict[str, str]]


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Reconstructs the images of `config.images`; a second run writes everything again.

    Args:
      config: config of `config.reconstruct_defaults`.
      folder: folder of the results.

    Raises:
      ValueError: where weights or images cannot be read, or no image is usable.
    """
    records = open_images(config.images, config.data_dir)
    metrics_of = functools.partial(_compiled_metrics(bool(config.weights.lpips)), _lpips(config))
    model = _open_autoencoder(config)
    survey = survey_images(records, config.short_side)
    for skipped in survey.skipped:
        console.report(f"{config.name}: skipped {skipped['name']}: {skipped['reason']}")
    if not survey.groups:
        raise ValueError(
            f"reconstruct needs at least one usable image; got {len(records)} unusable in "
            f"{config.images} (first: {survey.skipped[0]['reason']}); name another folder"
        )
    notes = [*model.notes, *_notes(config, survey)]
    for note in notes:
        console.report(f"{config.name}: {note}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = _measure(model, metrics_of, records, survey, config, folder)
    _finish(folder, config, model, rows, survey, notes)


def open_images(images: str, data_dir: str = "") -> Records:
    """All images of a folder, or the split eval of a source of the data pipeline.

    Raises:
      ValueError: where there are no images, or they cannot be read.
    """
    if images.startswith(SOURCE_KINDS) and not os.path.isdir(images):
        return sources.open_records(images, "eval", data_dir=data_dir or None)
    if files.path(images).is_dir():
        return sources.open_folder(images)
    raise ValueError(
        f"images is a folder of images, or one of {', '.join(SOURCE_KINDS)}...; got {images!r}, "
        "which is not a folder; check the path"
    )


def survey_images(records: Records, short_side: int) -> Survey:
    """Decodes every image once, groups them by size and lists those that are not usable."""
    survey = Survey({}, {}, [])
    every = console.progress("looked at images", iter(range(len(records))), len(records), 1)
    for index in every:
        try:
            image = _resize(crops.decode_rgb(records.read(index)[0]), short_side)
        except OSError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            survey.skipped.append({"name": records.name(index), "reason": reason})
            continue
        height, width = crop_to_patches(image).shape[:2]
        if not height or not width:
            reason = f"{image.shape[1]} x {image.shape[0]} pixels, smaller than a patch of 16"
            survey.skipped.append({"name": records.name(index), "reason": reason})
            continue
        survey.groups.setdefault((height, width), []).append(index)
        survey.uncropped[index] = (image.shape[0], image.shape[1])
    return survey


def crop_to_patches(image: Image) -> Image:
    """Crops both sides centrally to multiples of the patch size; a view."""
    patch = names.PATCH_SIZE
    height, width = (side - side % patch for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def table(rows: list[Row], totals: Row) -> str:
    """The metrics as text, one line per image and the mean at the end."""
    metrics = [name for name in UNITS if name in totals]
    titles = [f"{name.upper()} {UNITS[name]}".strip() for name in metrics]
    width = max(len(row["name"]) for row in [*rows, {"name": "mean of 100,000 images"}])
    lines = [f"{'image':{width}}  {'size':>11}  " + "  ".join(f"{title:>8}" for title in titles)]
    for row in rows:
        height, width_of_image = row["size"]
        size = f"{width_of_image}x{height}"
        values = "  ".join(f"{row[name]:8.4f}" for name in metrics)
        lines.append(f"{row['name']:{width}}  {size:>11}  {values}")
    values = "  ".join(f"{totals[name]:8.4f}" for name in metrics)
    lines.append(f"{f'mean of {len(rows):,} images':{width}}  {'':>11}  {values}")
    return "\n".join(lines)


def _open_autoencoder(config: ml_collections.ConfigDict) -> Autoencoder:
    source = inputs.open_weights(config)
    return Autoencoder(source, config.dtype, config.pixel_range, batch_size=config.batch_size)


def _lpips(config: ml_collections.ConfigDict) -> Any:
    """Variables of LPIPS; empty where no weights are named."""
    path = config.weights.lpips
    return weight_source.load_frozen("lpips", path, {}) if path else {}


def _notes(config: ml_collections.ConfigDict, survey: Survey) -> list[str]:
    """What a reader of the results must know."""
    used = {index: size for size, indices in survey.groups.items() for index in indices}
    cropped = sum(survey.uncropped[index] != size for index, size in used.items())
    notes = [
        f"{len(used)} images of {len(survey.groups)} sizes; the sides of {cropped} were cropped "
        "centrally to multiples of 16."
    ]
    if config.short_side:
        notes.append(f"The short side was resized to {config.short_side} pixels before that.")
    if not config.weights.lpips:
        command = names.CONVERSIONS["lpips"].command()
        notes.append(
            f"LPIPS is left out, it needs weights: convert them with `{command}` and pass "
            "--config.weights.lpips=weights/lpips."
        )
    return notes


def _measure(
    model: Autoencoder,
    metrics_of: Callable[[jax.Array], dict[str, jax.Array]],
    records: Records,
    survey: Survey,
    config: ml_collections.ConfigDict,
    folder: epath.Path,
) -> list[Row]:
    """Reconstructs, measures and draws every usable image: rows in the order of the set."""
    rows: dict[int, Row] = {}
    count = sum(map(len, survey.groups.values()))
    batches = (
        (size, *batch)
        for size in sorted(survey.groups)
        for batch in _load(records, survey.groups[size], config)
    )
    for size, indices, originals in console.progress(
        config.name, batches, count, config.batch_size
    ):
        decoded = model.reconstruct(autoencoder_lib.unit_interval(originals))
        shown = np.asarray(image_quality.to_uint8(jnp.asarray(decoded), CONVERSION))
        pair = np.stack([shown, originals], axis=1)
        metrics = batching.map_batches(metrics_of, pair, config.batch_size, model.mesh)
        for row, index in enumerate(indices):
            rows[index] = {
                "name": records.name(index),
                "picture": _picture_name(records, index),
                "size": list(size),
                "size_before_cropping": list(survey.uncropped[index]),
                **{name: float(values[row]) for name, values in metrics.items()},
            }
            path = folder / rows[index]["picture"]
            _write_picture(path, originals[row], shown[row])
    return [rows[index] for index in sorted(rows)]


def _resize(image: Image, short_side: int) -> Image:
    return crops.resize_short_side(image, short_side) if short_side else image


def _load(
    records: Records, indices: list[int], config: ml_collections.ConfigDict
) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """Batches of a group: (indices, cropped images [b, h, w, 3])."""
    for start in range(0, len(indices), config.batch_size):
        batch = indices[start : start + config.batch_size]
        images = (crops.decode_rgb(records.read(index)[0]) for index in batch)
        yield batch, np.stack([crop_to_patches(_resize(i, config.short_side)) for i in images])


@functools.lru_cache
def _compiled_metrics(with_lpips: bool) -> Callable[..., dict[str, jax.Array]]:
    @jax.jit
    def metrics(variables: Any, pair: jax.Array) -> dict[str, jax.Array]:
        """Metrics [b] of pairs uint8 [b, 2, h, w, 3], reconstruction first."""
        images = autoencoder_lib.unit_interval(pair)
        shown, original = images[:, 0], images[:, 1]
        values = {
            "psnr": image_quality.psnr(shown, original, PSNR),
            "ssim": image_quality.ssim(shown, original, SSIM),
        }
        if with_lpips:
            distances: Any = LPIPS().apply(variables, original, shown)
            values["lpips"] = distances
        return values

    return metrics


def _picture_name(records: Records, index: int) -> str:
    """A file name that no other image of the set has."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", pathlib.PurePath(records.name(index)).stem)
    return f"images/{index:05d}_{plain[:80]}.png"


def _write_picture(path: epath.Path, original: Image, shown: Image) -> None:
    if jax.process_index() == 0:
        png.write_png(path, pictures.side_by_side([original, shown]))


def _finish(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    model: Autoencoder,
    rows: list[Row],
    survey: Survey,
    notes: list[str],
) -> None:
    """Prints the table and writes results.json."""
    totals = {
        name: float(np.mean([row[name] for row in rows])) for name in UNITS if name in rows[0]
    }
    recipe = {
        "psnr": f"{PSNR}, mean of the images' dB",
        "ssim": SSIM,
        "uint8_conversion": CONVERSION,
        "crop": "centre, to multiples of 16",
        "short_side": config.short_side,
        "dtype": str(np.dtype(model.modules.decoder.dtype)),
    }
    if "lpips" in totals:
        recipe["lpips"] = "VGG16, v0.1, on [-1, 1]"
    console.report(table(rows, totals))
    console.report(
        f"Conventions: PSNR {PSNR!r}, SSIM {SSIM!r}, 8-bit conversion {CONVERSION!r} "
        "(eval/image_quality.py)"
    )
    if jax.process_index() != 0:
        return
    results = {
        "model": config.init_from or "random",
        "images": config.images,
        "notes": notes,
        "recipe": recipe,
        "count": len(rows),
        "mean": totals,
        "per_image": rows,
        "skipped": survey.skipped,
        "config": json.loads(json.dumps(config.to_dict())),
    }
    files.write_json(folder / "results.json", results)
    console.report(f"{config.name}: wrote {folder / 'results.json'} and {folder / 'images'}")
