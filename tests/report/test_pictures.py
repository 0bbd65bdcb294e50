"""Contact sheets: where each image ends up, and that files come back as written."""

import numpy as np
import pytest

from dinosae_jax.data import png
from dinosae_jax.report import pictures


def flat(*levels, side=8):
    """Grey images [b,side,side,3] of the given levels in [0,1]."""
    return np.stack([np.full((side, side, 3), level, np.float32) for level in levels])


def test_as_picture_rounds_clips_and_survives_nan():
    levels = np.asarray([-1.0, 0.5 / 255 + 1e-4, 2.0, np.nan], np.float32).reshape(1, 4, 1)
    np.testing.assert_array_equal(png.as_picture(levels)[0, :, 0], [0, 1, 255, 0])


def test_grid_reads_left_to_right_and_fills_the_last_row_with_background():
    sheet = pictures.grid(flat(0.0, 0.2, 0.4), columns=2)
    step = 8 + pictures.GAP
    assert sheet.shape == (8 + step, 8 + step, 3)
    corners = sheet[[0, 0, step, step], [0, step, 0, step], 0]
    np.testing.assert_array_equal(corners, [0, 51, 102, 255])


def test_pairs_put_each_reconstruction_below_its_original():
    sheet = pictures.pairs(flat(0.0, 0.2, 0.4), flat(0.6, 0.8, 1.0), columns=2)
    step = 8 + pictures.GAP
    np.testing.assert_array_equal(sheet[[0, 9], [step, step], 0], [51, 204])
    second = 17 + 3 * pictures.GAP
    np.testing.assert_array_equal(sheet[[second, second + 9], [0, 0], 0], [102, 255])


def test_side_by_side_takes_pictures_of_different_width():
    wide = np.zeros((8, 20, 3), np.uint8)
    sheet = pictures.side_by_side([flat(1.0)[0], wide])
    assert sheet.shape == (8, 8 + pictures.GAP + 20, 3)
    assert sheet[0, -1, 0] == 0


def test_class_grid_names_every_row():
    samples = np.stack([flat(0.0, 0.2, side=16), flat(0.4, 0.6, side=16)])
    sheet = pictures.class_grid(samples, ["coffee", "a_very_long_name_of_a_class"])
    assert sheet.shape[0] == 2 * 16 + pictures.GAP
    np.testing.assert_array_equal(sheet[[0, -1], [-1, -1], 0], [51, 153])
    assert sheet[:, : -2 * (16 + pictures.GAP)].min() < 200  # ink left of the images


def test_a_labelled_grid_has_a_name_below_each_image():
    names = ["a_cup", "a_name_that_is_longer_than_the_image", ""]
    sheet = pictures.labelled_grid(flat(0.0, 0.4, 0.6, side=128), names, 2)
    height = 128 + 16
    assert sheet.shape == (2 * height + pictures.GAP, 2 * 128 + pictures.GAP, 3)
    below = sheet[128:height]
    assert below[:, :128].min() < 200 and below[:, 128 + pictures.GAP :].min() < 200
    assert (sheet[height + pictures.GAP + 128 :, :128] == pictures.BACKGROUND).all()


def test_files_come_back_as_written(tmp_path):
    sheet = pictures.captioned(pictures.grid(flat(0.1, 0.9), 2), "stage1")
    png.write_png(tmp_path / "sheet.png", sheet)
    np.testing.assert_array_equal(png.decode_png((tmp_path / "sheet.png").read_bytes()), sheet)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: png.as_picture(np.zeros((4, 4, 2))), "1 or 3 channels"),
        (lambda: pictures.pairs(flat(0.0), flat(0.0, 0.0)), "one shape"),
        (lambda: pictures.class_grid(flat(0.0)[None], ["a", "b"]), "one name per row"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_kept():
    small = flat(0.2, 0.8, side=48)
    found = pictures.enlarged(small, side=128)
    assert found.shape == (2, 144, 144, 3)
    np.testing.assert_array_equal(found[:, 70, 70, 0], [51, 204])
    assert pictures.enlarged(small, side=48).shape == (2, 48, 48, 3)
