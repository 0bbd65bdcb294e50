"""Contact sheets: batches of images laid out as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from dinosae_jax.data import png

GAP = 4
BACKGROUND = 255
INK = (60, 60, 60)


def enlarged(images: ArrayLike, side: int = 128) -> png.Picture:
    """Enlarges images [b, h, w, c] whose short side is below `side` by a whole factor (bicubic).

    Returns:
      uint8 [b, h', w', 3] with both sides at least `side`; larger images as they are.
    """
    array = png.as_picture(images)
    height, width = array.shape[1:3]
    factor = -(-side // min(height, width))
    if factor == 1:
        return array
    size = (factor * width, factor * height)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in array]
    )


def grid(images: ArrayLike, columns: int) -> png.Picture:
    """Lays images [b, h, w, c] out in rows of `columns`, in reading order: uint8 [H, W, 3]."""
    pictures = list(png.as_picture(images))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return stack([_beside(row) for row in rows])


def pairs(originals: ArrayLike, reconstructions: ArrayLike, columns: int = 8) -> png.Picture:
    """Lays originals out in rows, each row above the row of its reconstructions.

    Args:
      originals: [b, h, w, c] in [0, 1].
      reconstructions: [b, h, w, c] in [0, 1].
      columns: pairs in a row.

    Returns:
      uint8 [H, W, 3]; a wider gap separates one row of pairs from the next.

    Raises:
      ValueError: shapes that differ.
    """
    above, below = png.as_picture(originals), png.as_picture(reconstructions)
    if above.shape != below.shape:
        raise ValueError(
            "originals and reconstructions must have one shape; got "
            f"{list(above.shape)} and {list(below.shape)}; pass the pairs of one batch"
        )
    starts = range(0, len(above), columns)
    rows = [
        stack([grid(batch[start : start + columns], columns) for batch in (above, below)], gap=1)
        for start in starts
    ]
    return stack(rows, gap=3 * GAP)


def side_by_side(images: Sequence[ArrayLike]) -> png.Picture:
    """Places images [h, w, c] of one height in a row: uint8 [h, W, 3]."""
    return _beside([png.as_picture(image) for image in images])


def class_grid(samples: ArrayLike, names: Sequence[str]) -> png.Picture:
    """Lays samples out with one class per row and the name of the class at its left.

    Args:
      samples: [k, m, h, w, c] in [0, 1]: m samples of each of k classes.
      names: k names; cut at 24 letters.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: if the number of names is not that of the classes.
    """
    rows = png.as_picture(samples)
    if len(rows) != len(names):
        raise ValueError(
            f"a class grid needs one name per row; got {len(names)} for {len(rows)} rows; name "
            "every class"
        )
    labels = [name.replace("_", " ")[:24] for name in names]
    width = max(_text_width(label) for label in labels) + 2 * GAP
    return stack(
        [
            _beside([_label(label, rows.shape[2], width), *row])
            for label, row in zip(labels, rows, strict=True)
        ]
    )


def labelled_grid(images: ArrayLike, names: Sequence[str], columns: int) -> png.Picture:
    """Lays images [b, h, w, c] out in rows of `columns`, each above its name, cut to its width."""
    cells = []
    for picture, name in zip(enlarged(images), names, strict=True):
        text = name.replace("_", " ")
        while text and _text_width(text) + GAP > picture.shape[1]:
            text = text[:-1]
        cells.append(stack([picture, _label(text, 16, picture.shape[1])], gap=0))
    return grid(np.stack(cells), columns)


def stack(pictures: Sequence[png.Picture], gap: int = GAP) -> png.Picture:
    """Places pictures [h, w, 3] one below the other, flush left: uint8 [H, W, 3]."""
    width = max(picture.shape[1] for picture in pictures)
    rows: list[png.Picture] = []
    for picture in pictures:
        if rows:
            rows.append(_blank(gap, width))
        rows.append(np.concatenate([picture, _blank(len(picture), width - picture.shape[1])], 1))
    return np.concatenate(rows)


def captioned(picture: png.Picture, caption: str, size: int = 12) -> png.Picture:
    """Puts a line of text of `size` pixels above a picture."""
    width = max(picture.shape[1], _text_width(caption, size) + 2 * GAP)
    return stack([_label(caption, size + 8, width, size), picture], gap=0)


def _beside(pictures: Sequence[png.Picture]) -> png.Picture:
    height = pictures[0].shape[0]
    columns: list[png.Picture] = []
    for picture in pictures:
        if columns:
            columns.append(_blank(height, GAP))
        columns.append(picture)
    return np.concatenate(columns, axis=1)


def _blank(height: int, width: int) -> png.Picture:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int = 12) -> int:
    return int(np.ceil(_font(size).getlength(text)))


def _label(text: str, height: int, width: int, size: int = 12) -> png.Picture:
    canvas = Image.fromarray(_blank(height, width))
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, height // 2), text, fill=INK, font=_font(size), anchor="lm")
    return np.asarray(canvas)
