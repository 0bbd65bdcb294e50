import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from dinosae_jax.data import crops


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def check_recorded(path):
    recorded = np.load(path)
    for i in range(5):
        image = recorded[f"crop{i}_in"]
        np.testing.assert_array_equal(crops.adm_center_crop(image, 64), recorded[f"crop{i}_out64"])
        np.testing.assert_array_equal(
            crops.resize_short_side(image, 48), recorded[f"resize{i}_pil_bicubic_short48"]
        )


def test_recorded_crops_are_bit_exact(data_dir):
    check_recorded(data_dir / "crops" / "iqa_crops.npz")


def test_recorded_crops_of_the_complete_folder(golden_dir):
    check_recorded(golden_dir / "metrics" / "iqa.npz")


def plain_adm_crop(image, size):
    """The crop by its definition: resize the whole image, then cut."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        half = [side // 2 for side in picture.size]
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    shape = [round(side * scale) for side in picture.size]
    whole = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    return whole[top : top + size, left : left + size]


def test_adm_crop_equals_its_definition_on_any_shape(rng):
    for _ in range(40):
        height, width = rng.integers(1, 300, 2)
        size = int(rng.integers(1, 100))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        np.testing.assert_array_equal(
            crops.adm_center_crop(image, size), plain_adm_crop(image, size)
        )


def test_random_crop_covers_every_place_and_enlarges_small_images(rng):
    image = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1).repeat(3, -1)
    corners = {int(crops.random_crop(image, 4, rng)[0, 0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8}
    assert crops.random_crop(image, 9, rng).shape == (9, 9, 3)


def test_flip_mirrors_about_half_of_the_images(rng):
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    flipped = sum(int(crops.flip(image, rng)[0, 0, 0] == 3) for _ in range(1000))
    assert 420 < flipped < 580  # five standard deviations of a fair coin


def encode(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.skipif(
    crops.simplejpeg is None, reason="NOT CHECKED: Pillow decodes; pip install -e '.[fast]'"
)
def test_jpeg_decoding_equals_pillow(rng):
    sizes = [(1, 1), (17, 9), (64, 48), (33, 70)]
    for mode, subsampling, size in itertools.product(["RGB", "L", "CMYK"], [0, 1, 2], sizes):
        ramp = np.linspace(20, 200, size[0])[:, None]
        pixels = (rng.integers(0, 40, (*size[::-1], 3)) + ramp).astype(np.uint8)
        picture = Image.fromarray(pixels).convert(mode)
        encoded = encode(picture, "JPEG", quality=85, subsampling=subsampling)
        expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        np.testing.assert_array_equal(crops.decode_rgb(encoded), expected)


def test_other_modes_become_rgb(rng):
    grey = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    colour = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    decoded = crops.decode_rgb(encode(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(decoded, grey[..., None].repeat(3, -1))
    high = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(crops.decode_rgb(encode(high, "PNG")), decoded)
    np.testing.assert_array_equal(
        crops.decode_rgb(encode(Image.fromarray(colour), "PNG")), colour[..., :3]
    )
    palette = Image.fromarray(colour[..., :3]).quantize(8)
    np.testing.assert_array_equal(
        crops.decode_rgb(encode(palette, "PNG")), np.asarray(palette.convert("RGB"))
    )


RAMP = np.linspace(0, 65535, 16 * 256).reshape(16, 256).astype(np.uint16)


def pnm(values, largest):
    return b"P5\n256 16\n%d\n" % largest + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "encoded",
    [
        encode(Image.fromarray(RAMP), "TIFF"),
        encode(Image.fromarray(RAMP), "PNG"),
        pnm(RAMP, 65535),
        pnm(RAMP >> 4, 4095),
        encode(Image.fromarray(65535 - RAMP), "TIFF", tiffinfo={262: 0}),
    ],
    ids=["tiff16", "png16", "pnm16", "pnm12", "tiff16 white is zero"],
)
def test_wide_grey_is_scaled_to_eight_bits(encoded):
    decoded = crops.decode_rgb(encoded)
    np.testing.assert_allclose(decoded[..., 0], RAMP >> 8, atol=1)
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_tiff_of_twelve_bits_is_scaled():
    """Pillow reads such files and writes none: a header, then two values in three bytes."""
    values = np.arange(0, 4096, 16)
    pairs = values.reshape(-1, 2)
    packed = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    strip = np.stack(packed, axis=1).astype(np.uint8).tobytes()
    tags = {256: 256, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(strip))
    file = header + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    np.testing.assert_array_equal(crops.decode_rgb(file)[0, :, 0], values >> 4)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_stated_range_are_no_image(kind):
    with pytest.raises(OSError, match="does not state which of them is white"):
        crops.decode_rgb(encode(Image.fromarray(RAMP.astype(kind)), "TIFF"))


@pytest.mark.parametrize("shape", [(4, 20_000), (20_000, 4), (3, 7_001)])
def test_strips_are_cut_before_they_are_enlarged(rng, shape, monkeypatch):
    strip = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    monkeypatch.setattr(crops, "LARGEST_RESIZED", 2**16)
    small = strip[:400, :400]
    cut = {
        "centre": lambda image: crops.adm_center_crop(image, 64),
        "random": lambda image: crops.random_crop(image, 64, np.random.default_rng(3)),
        "resized": lambda image: crops.random_crop(image, 64, np.random.default_rng(3), 96),
    }
    for crop in cut.values():
        found = crop(small).astype(int)
        with monkeypatch.context() as whole:
            whole.setattr(crops, "LARGEST_RESIZED", 2**40)
            difference = np.abs(found - crop(small))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        resized, largest = [], Image.Image.resize

        def resize(picture, size, *options, resized=resized, largest=largest):
            resized.append(size[0] * size[1])
            return largest(picture, size, *options)

        with monkeypatch.context() as watched:
            watched.setattr(Image.Image, "resize", resize)
            assert crop(strip).shape == (64, 64, 3)
        assert resized == [64 * 64]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_raise_oserror_or_decode(form, rng):
    picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    encoded = encode(picture, form)
    with pytest.raises(OSError):
        crops.decode_rgb(encoded[: len(encoded) // 3])
    with pytest.raises(OSError):
        crops.decode_rgb(b"")
    for _ in range(60):
        damaged = bytearray(encoded)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        try:
            assert crops.decode_rgb(bytes(damaged)).dtype == np.uint8
        except OSError:
            continue
