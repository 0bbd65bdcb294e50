"""Batches and references of the ADM suite: what is written can be read by NumPy and by us."""

import dataclasses

import numpy as np
import pytest

from dinosae_jax.data import adm_npz
from dinosae_jax.eval import adm_moments, frechet
from dinosae_jax.eval.recipe import Recipe
from dinosae_jax.runtime import files
from tests import tiny

RECIPE = Recipe("inception_fid", "pool3", "tf1_bilinear", resolution=8, network_sha256="6726825d")


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_batches_are_written_and_read_as_streams(tmp_path):
    path, expected = tmp_path / "samples.npz", images(11)
    padded = [expected[:4], expected[4:8], np.concatenate([expected[8:], expected[:1]])]
    adm_npz.write_images(path, padded, 11)
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], expected)
    archive = adm_npz.open_archive(path)
    assert archive.shape == (11, 8, 8, 3)
    batches = list(archive.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 1]
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_compressed_archives_of_numpy_are_read(tmp_path):
    np.savez_compressed(tmp_path / "samples.npz", arr_0=images(3), arr_1=np.arange(3))
    batches = adm_npz.open_archive(tmp_path / "samples.npz").batches(2)
    np.testing.assert_array_equal(np.concatenate(list(batches)), images(3))


def test_references_come_back_with_their_recipe(tmp_path):
    generator = np.random.default_rng(0)
    pool = frechet.statistics(generator.normal(size=(30, 6)), RECIPE)
    spatial = frechet.statistics(generator.normal(size=(30, 4)), RECIPE)
    path = tmp_path / "reference.npz"
    tiny.write_reference(path, images(5), pool, spatial)
    read = adm_moments.read_moments(path, "pool3")
    assert read.recipe == pool.recipe
    np.testing.assert_allclose(read.covariance, pool.covariance, rtol=1e-13)
    assert adm_moments.read_moments(path, "spatial").recipe.tap == "spatial"
    assert adm_npz.open_archive(path).shape == (5, 8, 8, 3)


def write_moments(path, **changes):
    """A reference like the published ones, which do not say how their moments were made."""
    moments = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    members = {"arr_0": images(4), **moments, **changes}
    np.savez(path, **{name: value for name, value in members.items() if value is not None})
    return path


def test_published_references_carry_adms_recipe(tmp_path, monkeypatch):
    path = write_moments(tmp_path / "any name.npz")
    known = {path.stat().st_size: files.file_sha256(path)}
    monkeypatch.setattr(adm_moments, "PUBLISHED", known)
    read = adm_moments.read_moments(path, "pool3")
    assert (read.recipe.resize, read.recipe.resolution) == ("tf1_bilinear", 8)
    assert read.count == 1_281_167
    np.testing.assert_allclose(read.covariance, np.eye(3), rtol=1e-13)
    other = dataclasses.replace(read, recipe=dataclasses.replace(RECIPE, resolution=256))
    with pytest.raises(ValueError, match="resolution 8 and 256"):
        frechet.frechet_distance(read, other)


def test_other_moments_are_what_the_config_says_or_unknown(tmp_path):
    path = write_moments(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    with pytest.raises(ValueError, match=r"--config\.reference_moments\.count=N") as error:
        adm_moments.read_moments(path, "pool3")
    assert "\n" not in str(error.value)
    answer = dataclasses.replace(RECIPE, resize="half_pixel_bilinear", count=50)
    read = adm_moments.read_moments(path, "spatial", answer)
    assert (read.count, read.recipe.resize) == (50, "half_pixel_bilinear")
    own = write_moments(tmp_path / "own.npz", recipe=dataclasses.replace(RECIPE, count=9).to_json())
    assert adm_moments.read_moments(own, "pool3").count == 9
    with pytest.raises(ValueError, match="leave reference_moments empty"):
        adm_moments.read_moments(own, "pool3", answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "with mu alone"),
        ({"mu": None}, "with sigma alone"),
        ({"sigma": np.eye(3) + np.eye(3, k=1)}, "an asymmetric matrix .* off by 1"),
        ({"sigma": np.diag([1.0, 1.0, -0.5])}, "negative eigenvalues .* off by 0.5"),
        ({"sigma": np.eye(3) + 2 * (1 - np.eye(3))}, "negative eigenvalues .* off by 1"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path, changes, message):
    path = write_moments(tmp_path / "reference.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        adm_moments.read_moments(path, "pool3", RECIPE)
    assert "\n" not in str(error.value)


def test_an_archive_of_images_alone_has_no_moments(tmp_path):
    adm_npz.write_images(tmp_path / "samples.npz", [images(2)], 2)
    assert adm_moments.read_moments(tmp_path / "samples.npz", "pool3") is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, r"with members images; name"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "alone do not say which resize made them"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"with float32 \[2, 8, 8, 3\]"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"with uint8 \[2, 3, 8, 8\]"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "in Fortran order"),
    ],
)
def test_wrong_layouts_are_one_clear_line(tmp_path, members, message):
    np.savez(tmp_path / "samples.npz", **members)
    with pytest.raises(ValueError, match=message) as error:
        adm_npz.open_archive(tmp_path / "samples.npz")
    assert "\n" not in str(error.value)


def test_other_bad_input_is_one_clear_line(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r", no \.npz; write"):
        adm_npz.open_archive(path)
    with pytest.raises(ValueError, match="needs the 5 images that were asked for; got 2"):
        adm_npz.write_images(path, [images(2)], 5)
    with pytest.raises(ValueError, match="takes uint8 images"):
        adm_npz.write_images(path, [images(2) / 255.0], 2)
    np.savez(path, arr_0=images(2), mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match="the file is damaged"):
        adm_moments.read_moments(path, "pool3")
    with pytest.raises(ValueError, match="stores the taps"):
        adm_moments.read_moments(path, "logits")
    np.savez(path, arr_0=images(2), mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="finite moments; got NaN"):
        adm_moments.read_moments(path, "pool3")


@pytest.mark.parametrize("count", [5, 200])  # found with the header, and with the last images
def test_bytes_that_changed_are_one_clear_line(tmp_path, count):
    path = tmp_path / "samples.npz"
    adm_npz.write_images(path, [images(count)], count)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"samples\.npz, which is damaged \(Bad CRC-32") as error:
        list(adm_npz.open_archive(path).batches(2))
    assert "\n" not in str(error.value)
