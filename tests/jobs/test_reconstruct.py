"""The reconstruction job: folders of any images in, side-by-side images and metrics out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import reconstruct as reconstruct_config
from dinosae_jax import rules
from dinosae_jax.data import crops, png
from dinosae_jax.eval import image_quality
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.jobs import reconstruct
from dinosae_jax.report import pictures
from dinosae_jax.weights import weight_source
from tests import tiny
from tests.weights_conversion import layouts

SIZES = {"a wide.png": (32, 48), "b.png": (32, 48), "c.png": (40, 35), "d.png": (32, 48)}


def make(**changes):
    config = reconstruct_config.get_config("tiny")
    config.random_model.update(tiny.model())
    config.update(changes)
    rules.validate(config)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four good pictures of two sizes, two damaged ones, one that is too small."""
    place = tmp_path_factory.mktemp("images")
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        picture = tiny.images(1, 40, 48, seed)[0, :height, :width]
        Image.fromarray(picture).save(place / name)
    whole = (place / "b.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    (place / "text.jpg").write_text("this is no picture")
    Image.fromarray(np.zeros((8, 64, 3), np.uint8)).save(place / "thin.png")
    (place / "readme.txt").write_text("not an image, not meant")
    return place


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """(workdir, results) of a run over the folder."""
    workdir = tmp_path_factory.mktemp("out")
    reconstruct.run(make(images=str(folder), batch_size=2), workdir)
    return workdir, json.loads((workdir / "results.json").read_text())


def test_every_usable_image_has_a_row_and_a_picture(done):
    workdir, results = done
    rows = results["per_image"]
    assert [row["name"] for row in rows] == list(SIZES)
    assert results["count"] == len(list((workdir / "images").iterdir())) == len(SIZES)
    for row in rows:
        assert tuple(row["size_before_cropping"]) == SIZES[row["name"]]
        assert row["size"] == [side - side % 16 for side in SIZES[row["name"]]]
        picture = png.decode_png((workdir / row["picture"]).read_bytes())
        assert picture.shape == (row["size"][0], 2 * row["size"][1] + pictures.GAP, 3)


def test_the_figures_are_those_of_the_pictures(done):
    """The written file alone is enough to compute PSNR and SSIM again."""
    workdir, results = done
    for row in results["per_image"]:
        picture = png.decode_png((workdir / row["picture"]).read_bytes()) / np.float32(255)
        width = row["size"][1]
        original, shown = picture[None, :, :width], picture[None, :, -width:]
        psnr = -10.0 * np.log10(np.mean((shown.astype(np.float64) - original) ** 2))
        assert row["psnr"] == pytest.approx(psnr, rel=1e-5)
    ssim = float(jax.jit(image_quality.ssim)(shown, original)[0])
    assert row["ssim"] == pytest.approx(ssim, rel=1e-4)
    for name in ("psnr", "ssim"):
        mean = np.mean([row[name] for row in results["per_image"]])
        assert results["mean"][name] == pytest.approx(mean, rel=1e-12)
    assert results["recipe"]["psnr"].startswith("rae") and results["recipe"]["ssim"] == "rae"
    assert "lpips" not in results["mean"]


def test_the_pictures_are_the_autoencoders(done, folder):
    workdir, results = done
    config = make(images=str(folder))
    model = Autoencoder(random_source(config.random_model.to_dict(), config.seed))
    row = results["per_image"][2]
    original = crops.decode_rgb((folder / "c.png").read_bytes())[4:36, 1:33]
    shown = model.reconstruct(original[None].astype(np.float32) / 255.0)[0]
    picture = png.decode_png((workdir / row["picture"]).read_bytes())
    np.testing.assert_array_equal(picture[:, :32], original)
    # Another batch size: rounding may move a value over the edge of a level.
    assert np.abs(picture[:, -32:] - np.floor(shown * 255.0)).max() <= 1


def test_what_is_left_out_is_named(done):
    _, results = done
    skipped = {row["name"]: row["reason"] for row in results["skipped"]}
    assert set(skipped) == {"cut.png", "text.jpg", "thin.png"}
    assert skipped["thin.png"] == "64 x 8 pixels, smaller than a patch of 16"
    notes = " ".join(results["notes"])
    assert "4 images of 2 sizes; the sides of 1 were cropped" in notes
    assert "randomly initialised" in notes and "--kind=lpips_vgg16" in notes


@pytest.mark.slow
def test_converted_official_weights_reconstruct_any_sides(folder, data_dir, tmp_path):
    official = layouts.official(data_dir, tmp_path)
    config = make(images=str(folder), init_from=str(official), random_frozen_ok=())
    reconstruct.run(config, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {tuple(row["size"]) for row in results["per_image"]} == {(32, 48), (32, 32)}
    assert "Starts from converted weights: official.safetensors." in results["notes"]
    assert "pixel_range='imagenet' are taken" in " ".join(results["notes"])
    model = Autoencoder.load(official)
    original = crops.decode_rgb((folder / "b.png").read_bytes())
    shown = model.reconstruct(original[None].astype(np.float32) / 255.0)[0]
    picture = png.decode_png((tmp_path / "out" / results["per_image"][1]["picture"]).read_bytes())
    assert np.abs(picture[:, -48:] - np.floor(shown * 255.0)).max() <= 1


def test_few_programs_are_compiled(folder, monkeypatch, tmp_path):
    shapes = []
    plain = Autoencoder.reconstruct

    def counted(self, images):
        shapes.append(images.shape)
        return plain(self, images)

    monkeypatch.setattr(Autoencoder, "reconstruct", counted)
    reconstruct.run(make(images=str(folder), batch_size=2), tmp_path)
    assert shapes == [(1, 32, 32, 3), (2, 32, 48, 3), (1, 32, 48, 3)]


class MeanDifference:
    """Takes the place of LPIPS: 15 million parameters more would show nothing about the job."""

    def apply(self, variables, a, b):
        return variables["scale"] * jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def test_lpips_is_measured_with_weights(tmp_path, monkeypatch, capsys):
    place = tmp_path / "images"
    place.mkdir()
    Image.fromarray(tiny.images(1, 64, 96)[0]).save(place / "large.png")
    asked = []

    def load_frozen(role, path, model):
        asked.append((role, path))
        return {"scale": 3.0}

    monkeypatch.setattr(weight_source, "load_frozen", load_frozen)
    monkeypatch.setattr(reconstruct, "LPIPS", MeanDifference)
    config = make(images=str(place), short_side=32, batch_size=2)
    config.weights.lpips = "weights/lpips"
    reconstruct.run(config, tmp_path / "out")
    assert asked == [("lpips", "weights/lpips")]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    row = results["per_image"][0]
    assert row["size"] == [32, 48] and row["size_before_cropping"] == [32, 48]
    picture = png.decode_png((tmp_path / "out" / row["picture"]).read_bytes()) / 255.0
    expected = 3.0 * np.abs(picture[:, :48] - picture[:, -48:]).mean()
    assert row["lpips"] == results["mean"]["lpips"] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    assert "PSNR dB" in printed and "LPIPS" in printed and "mean of 1 images" in printed
    assert "SSIM 'rae'" in printed and "resized to 32 pixels" in printed


def test_sides_are_cropped_centrally():
    image = np.arange(35 * 40 * 3, dtype=np.uint16).reshape(35, 40, 3)
    np.testing.assert_array_equal(reconstruct.crop_to_patches(image), image[1:33, 4:36])
    assert reconstruct.crop_to_patches(image[:8]).shape == (0, 32, 3)


def test_a_folder_is_read_whole_also_where_a_part_is_called_train(tmp_path):
    for name in ("train/a.png", "holiday/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(tiny.images(1, 32, 32)[0]).save(tmp_path / name)
    records = reconstruct.open_images(str(tmp_path))
    found = [records.name(index) for index in range(len(records))]
    assert found == ["c.png", "holiday/b.png", "train/a.png"]


def test_the_embedded_photographs_are_a_source(tmp_path):
    records = reconstruct.open_images("photos/112", str(tmp_path))
    survey = reconstruct.survey_images(records, 0)
    assert set(survey.groups) == {(64, 64)} and not survey.skipped


def test_mistakes_are_named_before_any_work(tmp_path):
    for changes, message in [
        ({"images": ""}, "reconstruct needs images; got images=''"),
        ({"random_frozen_ok": ()}, "reconstruct needs an autoencoder; got an empty init_from"),
        ({"short_side": 8}, "at least the patch size 16"),
        ({"batch_size": 0}, "batch_size must be above zero"),
        ({"dtype": "float16"}, "dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**changes)
    with pytest.raises(ValueError, match="which is not a folder"):
        reconstruct.open_images(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"must hold images that end in .* with none"):
        reconstruct.open_images(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="at least one usable image; got 1 unusable in"):
        reconstruct.run(make(images=str(tmp_path)), tmp_path / "out")
