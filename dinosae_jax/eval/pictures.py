"""Contact sheets: batches of images laid out as one picture and written as PNG."""

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 4
BACKGROUND = 255
INK = (60, 60, 60)

Picture = NDArray[np.uint8]  # [height, width, 3]


def as_picture(image: ArrayLike) -> Picture:
    """Converts an image to 8-bit RGB by rounding.

    Args:
      image: [...,h,w,3] or [...,h,w,1], floating point in [0,1] (clipped, NaN becomes black) or
        uint8, which is kept.

    Returns:
      uint8 [...,h,w,3].
    """
    array = np.asarray(image)
    if array.dtype != np.uint8:
        levels = np.nan_to_num(np.asarray(array, np.float32)) * 255.0 + 0.5
        array = np.clip(levels, 0.0, 255.0).astype(np.uint8)
    if array.shape[-1] not in (1, 3):
        raise ValueError(f"pictures need 1 or 3 channels last, got shape {array.shape}")
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def enlarged(images: ArrayLike, side: int = 128) -> Picture:
    """Enlarges images [b,h,w,c] whose short side is below `side` by a whole factor (bicubic).

    Returns:
      uint8 [b,h',w',3] with both sides at least `side`; larger images as they are.
    """
    array = as_picture(images)
    height, width = array.shape[1:3]
    factor = -(-side // min(height, width))
    if factor == 1:
        return array
    size = (factor * width, factor * height)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in array]
    )


def grid(images: ArrayLike, columns: int) -> Picture:
    """Lays images [b,h,w,c] out in rows of `columns`, in reading order: uint8 [H,W,3]."""
    pictures = list(as_picture(images))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return stack([_beside(row) for row in rows])


def pairs(originals: ArrayLike, reconstructions: ArrayLike, columns: int = 8) -> Picture:
    """Lays originals out in rows, each row above the row of its reconstructions.

    Args:
      originals: [b,h,w,c] in [0,1].
      reconstructions: [b,h,w,c] in [0,1].
      columns: pairs in a row.

    Returns:
      uint8 [H,W,3]; a wider gap separates one row of pairs from the next.

    Raises:
      ValueError: shapes that differ.
    """
    above, below = as_picture(originals), as_picture(reconstructions)
    if above.shape != below.shape:
        raise ValueError(
            "originals and reconstructions must have one shape, "
            f"got {above.shape} and {below.shape}"
        )
    starts = range(0, len(above), columns)
    rows = [
        stack([grid(batch[start : start + columns], columns) for batch in (above, below)], gap=1)
        for start in starts
    ]
    return stack(rows, gap=3 * GAP)


def side_by_side(images: Sequence[ArrayLike]) -> Picture:
    """Places images [h,w,c] of one height beside one another: uint8 [h,W,3]."""
    return _beside([as_picture(image) for image in images])


def class_grid(samples: ArrayLike, names: Sequence[str]) -> Picture:
    """Lays samples out with one class a row and the name of the class at its left.

    Args:
      samples: [k,m,h,w,c] in [0,1]: m samples of each of k classes.
      names: k names; cut at 24 letters.

    Returns:
      uint8 [H,W,3].

    Raises:
      ValueError: another number of names than of classes.
    """
    rows = as_picture(samples)
    if len(rows) != len(names):
        raise ValueError(
            f"a class grid needs one name a row, got {len(names)} for {len(rows)} rows"
        )
    labels = [name.replace("_", " ")[:24] for name in names]
    width = max(_text_width(label) for label in labels) + 2 * GAP
    return stack(
        [
            _beside([_label(label, rows.shape[2], width), *row])
            for label, row in zip(labels, rows, strict=True)
        ]
    )


def stack(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Places pictures [h,w,3] one below the other, flush left: uint8 [H,W,3]."""
    width = max(picture.shape[1] for picture in pictures)
    rows: list[Picture] = []
    for picture in pictures:
        if rows:
            rows.append(_blank(gap, width))
        rows.append(np.concatenate([picture, _blank(len(picture), width - picture.shape[1])], 1))
    return np.concatenate(rows)


def captioned(picture: Picture, caption: str, size: int = 12) -> Picture:
    """Puts a line of text of `size` pixels above a picture."""
    width = max(picture.shape[1], _text_width(caption, size) + 2 * GAP)
    return stack([_label(caption, size + 8, width, size), picture], gap=0)


def decode_png(data: bytes) -> Picture:
    """Decodes a PNG file's content to uint8 [h,w,3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def write_png(path: pathlib.Path, picture: ArrayLike) -> None:
    """Writes a picture [h,w,c] as PNG; readers never see half a file."""
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(np.ascontiguousarray(as_picture(picture))).save(partial, format="PNG")
    os.replace(partial, path)


def _beside(pictures: Sequence[Picture]) -> Picture:
    height = pictures[0].shape[0]
    columns: list[Picture] = []
    for picture in pictures:
        if columns:
            columns.append(_blank(height, GAP))
        columns.append(picture)
    return np.concatenate(columns, axis=1)


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int = 12) -> int:
    return int(np.ceil(_font(size).getlength(text)))


def _label(text: str, height: int, width: int, size: int = 12) -> Picture:
    canvas = Image.fromarray(_blank(height, width))
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, height // 2), text, fill=INK, font=_font(size), anchor="lm")
    return np.asarray(canvas)
