"""Decoding, resizing and cropping of uint8 images, with Pillow's arithmetic where exactness counts.

Every function takes and returns uint8 [h,w,3] arrays. Pillow resizes in 8-bit fixed point and
antialiases when it shrinks; `torch.nn.functional.interpolate` and `jax.image.resize` do not give
the same pixels, so nothing here is done on the device.

Pillow resizes in two passes and rounds between them. Up to 12.2 the rows came first; 13 takes the
cheaper order, which changes some pixels of some shapes (none at 500x375 -> 256). The recordings in
tests/recordings are Pillow 13's.
"""

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


def decode_rgb(encoded: bytes) -> np.ndarray:
    """Decode an image file's bytes into uint8 RGB [h,w,3].

    JPEG goes through simplejpeg where that is installed: the same libjpeg-turbo arithmetic as
    Pillow's, bit for bit, with fewer copies. What it refuses or warns about, Pillow decides on.

    Greyscale is repeated over the channels, a palette is looked up, CMYK is converted by Pillow's
    plain formula (no colour profile), an alpha channel is dropped (the colours below it are kept,
    nothing is blended), and 16-bit greyscale keeps its high byte. Exif rotation is not applied:
    ImageNet's reference pipelines do not apply it either. Of an animation the first frame is read.

    Raises:
        OSError: the bytes are no image that Pillow reads, or they are cut short.
    """
    if simplejpeg is not None and encoded.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            if simplejpeg.decode_jpeg_header(encoded)[2] in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(encoded)
    try:
        picture: Image.Image = Image.open(io.BytesIO(encoded))
        picture.load()
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError as error:  # its message names a Python object
        raise OSError("no image format that Pillow reads") from error
    except Exception as error:  # damaged bytes make Pillow's parsers raise a dozen kinds
        raise OSError(str(error)) from error


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [h,w,3] so that the short side has `size` pixels: Pillow bicubic, antialiased.

    The long side is truncated to int(size * long / short), torchvision's rule, which RAE's
    training pipeline uses. An image that has the size already is returned as it is.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    shape = (int(size * width / short), int(size * height / short))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the centre square of an image, the crop of ADM's evaluation (guided-diffusion).

    While the short side is at least twice `size` both sides are halved with a box filter, then
    the short side is brought to `size` with bicubic (smaller images are enlarged), then the
    central square is cut. Bit-equal to the original, which works through Pillow as well.

    Args:
        image: uint8 [h,w,3].
        size: side of the square in pixels.

    Returns:
        uint8 [size,size,3].
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
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square of `size` pixels at a uniformly drawn place; uint8 [size,size,3], a view.

    An image whose short side is below `size` is first enlarged to it (bicubic).
    """
    if min(image.shape[:2]) < size:
        image = resize_short_side(image, size)
    height, width = image.shape[:2]
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return image[top : top + size, left : left + size]


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random part of 8 to 100% of the area and bring it to a square (bicubic, antialiased).

    torchvision's RandomResizedCrop at its default scale and ratio: the aspect ratio is drawn
    log-uniformly from 3/4 to 4/3; after ten parts that do not fit, the largest central one within
    these ratios is taken.

    Args:
        image: uint8 [h,w,3].
        size: side of the square in pixels.
        rng: where the draws come from.

    Returns:
        uint8 [size,size,3].
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
    """Mirror the image left to right with probability one half; uint8 [h,w,3], a view."""
    return image[:, ::-1] if draw_flip(rng) else image
