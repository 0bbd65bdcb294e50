"""Decoding, resizing and cropping of uint8 images, with Pillow's arithmetic where exactness counts.

Every function takes and returns uint8 [h, w, 3] arrays. Pillow resizes in 8-bit fixed point and
antialiases when it shrinks. `torch.nn.functional.interpolate` and `jax.image.resize` do not give
the same pixels, so nothing here is done on the device.

One rule for images that are smaller than a crop: they are enlarged (bicubic) until their short side
fits, whichever the crop and wherever the image stands in its set.

Pillow resizes in two passes and rounds between them. Up to 12.2 the rows came first; 13 takes the
cheaper order, which changes some pixels of some shapes (none at 500x375 -> 256). The recordings in
tests/recordings are Pillow 13's.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from dinosae_jax.data.order import draw_flip

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes the same pixels, more slowly
    simplejpeg = None

PART, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop
FILTER = "Pillow: bicubic, antialiased; ADM's centre crop halves with a box filter first"
COLOUR = "Pillow's RGB: grey repeated, CMYK by formula, alpha dropped, wide grey by its high bits"
LARGEST_RESIZED = 2**24  # pixels: of a larger result, a strip's, the part that is wanted alone
REACH = 3  # pixels around a part that bicubic enlarging looks at, and one more
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262  # tags


def decode_rgb(encoded: bytes) -> np.ndarray:
    """Returns the image of a file's bytes as uint8 RGB [h, w, 3].

    JPEG goes through simplejpeg where that is installed: the same libjpeg-turbo arithmetic as
    Pillow's, bit for bit, with fewer copies. What it refuses or warns about, Pillow decides on.

    Greyscale is repeated over the channels, a palette is looked up, CMYK is converted by Pillow's
    plain formula (no colour profile), an alpha channel is dropped (the colours below it are kept,
    nothing is blended), and greyscale of 12 or 16 bits keeps its 8 high bits. Exif rotation is not
    applied: ImageNet's reference pipelines do not apply it either. Of an animation the first frame
    is read.

    Raises:
      OSError: the bytes are no image that Pillow reads, they are cut short, or they hold numbers
        whose range no one states (32-bit integers, floating point).
    """
    if simplejpeg is not None and encoded.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            if simplejpeg.decode_jpeg_header(encoded)[2] in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(encoded)
    try:
        picture: Image.Image = Image.open(io.BytesIO(encoded))
        picture.load()
        return np.asarray(_eight_bits(picture).convert("RGB"))
    except UnidentifiedImageError as error:  # its message names a Python object
        raise OSError("no image format that Pillow reads") from error
    except Exception as error:  # damaged bytes make Pillow's parsers raise a dozen kinds
        raise OSError(str(error)) from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A wide grey image by its 8 high bits, any other as it is; Pillow would cut at 255."""
    if picture.mode.startswith("I;16"):
        tags = getattr(picture, "tag_v2", {})
        bits = min(tags.get(TIFF_BITS, (16,)))
        grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - grey if tags.get(TIFF_PHOTOMETRIC) == 0 else grey)
    if picture.mode == "I" and picture.format == "PPM":  # which Pillow scales to 16 bits
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        numbers = "32-bit integers" if picture.mode == "I" else "floating point numbers"
        raise OSError(f"an image of {numbers} does not state which of them is white")
    return picture


def short_side_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns (height, width) after the short side is brought to `size` pixels.

    The long side is truncated to int(size * long / short), torchvision's rule, which RAE's
    training pipeline uses.
    """
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the image with a short side of `size` pixels: Pillow bicubic, antialiased.

    An image that has the size already is returned as it is.

    Args:
      image: uint8 [h, w, 3].
      size: pixels; `short_side_shape` has the rule for the long side.
    """
    if min(image.shape[:2]) == size:
        return image
    height, width = short_side_shape(image.shape[0], image.shape[1], size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the centre square of an image, the crop of ADM's evaluation (guided-diffusion).

    While the short side is at least twice `size` both sides are halved with a box filter, then
    the short side is brought to `size` with bicubic (smaller images are enlarged), then the
    central square is cut. Bit-equal to the original, which works through Pillow as well.

    Args:
      image: uint8 [h, w, 3].
      size: side of the square in pixels.

    Returns:
      uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        half = (picture.size[0] // 2, picture.size[1] // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    return _resized_part(picture, (width, height), (width - size) // 2, (height - size) // 2, size)


def random_crop(
    image: np.ndarray, size: int, rng: np.random.Generator, short_side: int = 0
) -> np.ndarray:
    """Cuts a square of `size` pixels at a uniformly drawn place; uint8 [size, size, 3].

    Args:
      image: uint8 [h, w, 3].
      size: side of the square in pixels; an image whose short side is below it is first enlarged
        to it (bicubic).
      rng: where the draws come from.
      short_side: pixels to which the short side is brought first, at least `size`; 0 leaves it.
    """
    height, width = image.shape[:2]
    wanted = short_side or max(size, min(height, width))
    if wanted != min(height, width):
        height, width = short_side_shape(height, width, wanted)
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    if (height, width) == image.shape[:2]:
        return image[top : top + size, left : left + size]
    return _resized_part(Image.fromarray(image), (width, height), left, top, size)


def _resized_part(
    picture: Image.Image, shape: tuple[int, int], left: int, top: int, size: int
) -> np.ndarray:
    """A square of a picture that is resized (bicubic) to shape (width, height).

    Of a result that is larger than the picture and than `LARGEST_RESIZED` only the square is
    computed: a strip of 4 x 20,000 pixels would take a gigabyte. Its pixels may then differ by one
    level where rounding decides, since Pillow takes places as 32-bit numbers.
    """
    corner = (left, top, left + size, top + size)
    if shape[0] * shape[1] <= max(LARGEST_RESIZED, picture.size[0] * picture.size[1]):
        return np.asarray(picture.resize(shape, Image.Resampling.BICUBIC).crop(corner))
    scale = [side / target for side, target in zip(picture.size, shape, strict=True)]
    x0, y0, x1, y1 = (edge * scale[place % 2] for place, edge in enumerate(corner))
    column, row = max(0, int(x0) - REACH), max(0, int(y0) - REACH)
    end = (min(picture.size[0], int(x1) + 1 + REACH), min(picture.size[1], int(y1) + 1 + REACH))
    box = (x0 - column, y0 - row, x1 - column, y1 - row)
    part = picture.crop((column, row, *end))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, box))


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a random part of 8 to 100% of the area and brings it to a square (bicubic, antialiased).

    torchvision's RandomResizedCrop at its default scale and ratio: the aspect ratio is drawn
    log-uniformly from 3/4 to 4/3; after ten parts that do not fit, the largest central one within
    these ratios is taken.

    Args:
      image: uint8 [h, w, 3].
      size: side of the square in pixels.
      rng: where the draws come from.

    Returns:
      uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*PART)
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        across, down = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
            break
    else:
        across = min(width, round(height * ASPECT[1]))
        down = min(height, round(width / ASPECT[0]))
        left, top = (width - across) // 2, (height - down) // 2
    box = (int(left), int(top), int(left + across), int(top + down))
    part = Image.fromarray(image).crop(box)
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right with probability one half; uint8 [h, w, 3]."""
    return mirror(image) if draw_flip(rng) else image


def mirror(image: np.ndarray) -> np.ndarray:
    """The image left to right, uint8 [h, w, 3].

    Copied channel by channel, which NumPy does in a sixth of the time that it needs for pixels of
    three bytes (0.07 ms against 0.47 ms for 256 x 256).
    """
    mirrored = np.empty_like(image)
    for channel in range(image.shape[-1]):
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored
