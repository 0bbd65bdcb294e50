"""The figure of feature maps: its layout, and what the job refuses."""

import numpy as np
import pytest

from configs import pca as config_file
from dinosae_jax import rules
from dinosae_jax.data import png
from dinosae_jax.jobs import pca
from dinosae_jax.report import pictures


def test_images_teacher_and_student_below_one_another(make_measurement, tmp_path, capsys):
    config = make_measurement(config_file, count=3)
    rules.validate(config)
    pca.run(config, tmp_path)
    picture = png.decode_png((tmp_path / "pca.png").read_bytes())
    assert picture.shape == (3 * 32 + 2 * pictures.GAP, 3 * 32 + 2 * pictures.GAP, 3)
    shown = png.as_picture(pca.choose_images(config))
    np.testing.assert_array_equal(picture[:32, :32], shown[0])
    tokens = picture[36:68, :32]  # the teacher's 2 x 2 tokens of the first image
    np.testing.assert_array_equal(tokens[:16, :16], np.broadcast_to(tokens[0, 0], (16, 16, 3)))
    out = capsys.readouterr().out
    assert "randomly initialised" in out and "mean cosine of student and teacher" in out


def test_the_cosine_of_equal_and_opposite_tokens():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 3, 8))
    assert pca.mean_cosine(tokens, 2.0 * tokens) == pytest.approx(1.0)
    assert pca.mean_cosine(tokens, -tokens) == pytest.approx(-1.0)


def test_bad_input_is_one_clear_line(make_measurement, tmp_path):
    with pytest.raises(ValueError, match="at least 1 image; got count=0"):
        pca.run(make_measurement(config_file, count=0), tmp_path)
    with pytest.raises(ValueError, match="'teacher' or 'joint'; got 'student'"):
        pca.run(make_measurement(config_file, fitted_on="student"), tmp_path)
