"""Images as 8-bit RGB arrays and PNG files."""

from __future__ import annotations

import io

import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dinosae_jax.runtime import files

Picture = NDArray[np.uint8]  # [height, width, 3]


def as_picture(image: ArrayLike) -> Picture:
    """Converts an image to 8-bit RGB by rounding.

    Args:
      image: [..., h, w, 3] or [..., h, w, 1], floating point in [0, 1] (clipped, NaN becomes
        black) or uint8, which is kept.

    Returns:
      uint8 [..., h, w, 3].

    Raises:
      ValueError: another number of channels.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8:
        levels = np.nan_to_num(np.asarray(array, np.float32)) * 255.0 + 0.5
        array = np.clip(levels, 0.0, 255.0).astype(np.uint8)
    if array.shape[-1] not in (1, 3):
        raise ValueError(
            f"pictures have 1 or 3 channels last; got shape {array.shape}; move or drop channels"
        )
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def decode_png(data: bytes) -> Picture:
    """Decodes a PNG file's content to uint8 [h, w, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def write_png(path: epath.Path, picture: ArrayLike, compress_level: int = 6) -> None:
    """Writes a picture [h, w, c] as PNG; readers never see half a file.

    Args:
      path: the file.
      picture: see `as_picture`.
      compress_level: of zlib, 0 to 9. 1 takes a sixth of the time of 6 for a photograph of 256
        pixels (6 ms instead of 37 ms), and 15% more bytes.
    """
    image = Image.fromarray(np.ascontiguousarray(as_picture(picture)))
    with files.publishing(path) as partial:
        image.save(partial, format="PNG", compress_level=compress_level)
