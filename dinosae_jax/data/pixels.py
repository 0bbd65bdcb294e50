"""What was done to the pixels of images that are stored, in an archive or as latents.

A record of it travels with them, and is compared with what a config crops its images from: another
crop, size, filter or colour handling is refused, since training would not notice it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinosae_jax.data import crops

AS_THEY_ARE = {"crop": "none"}
FLAGS = {
    "none": "--config.crop_size=0 --config.short_side=0",
    "adm_center": "--config.crop_size={size}",
    "short_side": "--config.short_side={size}",
}


def record(crop: str, size: int) -> dict[str, Any]:
    """Returns what travels with stored images.

    Args:
      crop: 'none' for the files as they are, 'adm_center' for ADM's centre crop, 'short_side' for
        images whose short side was brought down to `size` where it was longer.
      size: in pixels.
    """
    if crop == "none":
        return dict(AS_THEY_ARE)
    return {"crop": crop, "size": size, "filter": crops.FILTER, "colour": crops.COLOUR}


def check(found: Mapping[str, Any], wanted: Mapping[str, Any], title: str, crop: str) -> None:
    """Compares the record of an archive with what a config crops its images from.

    Args:
      found: record of the archive; files as they are suit every config.
      wanted: record of what the config's crop starts from.
      title: of the archive.
      crop: how the config names its crop, for the message.

    Raises:
      ValueError: the archive holds other pixels.
    """
    if found in (AS_THEY_ARE, wanted):
        return
    flags = FLAGS[wanted["crop"]].format(size=wanted.get("size"))
    if flags != FLAGS["none"]:
        flags += f" (or {FLAGS['none']}, which suits every config)"
    differing = [key for key in wanted if key in found and found[key] != wanted[key]]
    raise ValueError(
        f"an archive must hold the pixels that training or evaluation cuts its images from; got "
        f"{title} with {_describe(found, differing)}, where {crop} wants "
        f"{_describe(wanted, differing)}; convert it again with {flags}"
    )


def _describe(pixels: Mapping[str, Any], differing: list[str]) -> str:
    names = {
        "none": "the files as they are",
        "adm_center": "ADM's centre crops of {size} pixels",
        "short_side": "short sides of at most {size} pixels",
    }
    crop = str(pixels["crop"])
    text = names.get(crop, f"{crop!r}").format(size=pixels.get("size"))
    others = [f"{key} {pixels[key]!r}" for key in differing if key in ("filter", "colour")]
    return ", ".join([text, *(each for each in others if "crop" not in differing)])
