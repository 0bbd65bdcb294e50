import multiprocessing
import pathlib
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dinosae_jax.data import crops, photos


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return photos.prepare(tmp_path_factory.mktemp("tfds"), "112")


def test_ten_photos_in_colour_come_from_the_installed_packages():
    for name in photos.FILES:
        photo = crops.decode_rgb(photos.photo_path(name).read_bytes())
        assert min(photo.shape[:2]) >= 300, name
        assert np.ptp(photo.astype(int), axis=-1).mean() > 1, f"{name} has no colour"


@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (512, 512), (7, 10)])
def test_training_and_evaluation_read_disjoint_source_pixels(shape):
    owners = np.zeros(shape, int)
    boxes = photos.split_boxes(*shape)
    for box in boxes.values():
        owners[box] += 1
    assert (owners == 1).all()  # every pixel of the source belongs to exactly one split
    strip = owners[boxes["eval"]]
    assert strip.size / owners.size == pytest.approx(photos.STRIP, abs=0.5 / max(shape))


def test_tiles_do_not_overlap():
    strip = np.arange(64 * 200, dtype=np.uint32).reshape(64, 200)
    coded = np.stack([strip % 256, strip // 256, strip * 0], -1).astype(np.uint8)
    tiles = photos.cut_tiles(coded, 64)
    assert len(tiles) == 3 and all(tile.shape == (64, 64, 3) for tile in tiles)
    numbers = np.concatenate(
        [(tile[..., 0] + 256 * tile[..., 1].astype(int)).ravel() for tile in tiles]
    )
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("config", ["72", "112"])
def test_splits_hold_resized_parts_and_tiles(tfds_dir, config):
    photos.prepare(tfds_dir, config)
    train = tfds.data_source(f"photos/{config}", data_dir=tfds_dir, split="train")
    assert [example["label"] for example in train] == list(range(10))
    assert {min(example["image"].shape[:2]) for example in train} == {int(config)}
    tiles = tfds.data_source(f"photos/{config}", data_dir=tfds_dir, split="eval")
    assert {example["image"].shape for example in tiles} == {(64, 64, 3)}
    assert {example["label"] for example in tiles} == set(range(10))


def test_examples_are_what_the_source_pixels_give(tfds_dir):
    name, label = "chelsea", list(photos.FILES).index("chelsea")
    photo = crops.decode_rgb(photos.photo_path(name).read_bytes())
    part = photo[photos.split_boxes(*photo.shape[:2])["train"]]
    train = tfds.data_source("photos/112", data_dir=tfds_dir, split="train")
    np.testing.assert_array_equal(train[label]["image"], crops.resize_short_side(part, 112))


def _prepare(folder, barrier):
    barrier.wait()
    photos.prepare(folder, "72")


def test_two_processes_may_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=_prepare, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(tfds.data_source("photos/72", data_dir=tmp_path, split="train")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def _prepare_and_hang(folder):
    photos.cut_tiles = lambda *_: time.sleep(600)
    photos.prepare(folder, "72")


def test_a_killed_build_leaves_nothing_that_is_read(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_prepare_and_hang, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".building-*/photos/72/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert list(tmp_path.glob(".building-*/photos/72/*"))  # it was killed in the middle
    assert not (tmp_path / "photos" / "72" / "1.0.0").exists()
    photos.prepare(tmp_path, "72")
    assert len(tfds.data_source("photos/72", data_dir=tmp_path, split="eval")) == 23


def test_preparing_again_keeps_the_files(tfds_dir):
    files = list(pathlib.Path(tfds_dir).glob("photos/112/**/*record*"))
    before = [file.stat().st_mtime_ns for file in files]
    assert photos.prepare(tfds_dir, "112") == tfds_dir
    assert files and [file.stat().st_mtime_ns for file in files] == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"name another in data\.data_dir"):
        photos.prepare(tmp_path / "file", "112")


def test_unknown_side_and_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\[72, 112, 256\]; got photos/100"):
        photos.prepare(tmp_path, "100")
    monkeypatch.setitem(photos.FILES, "china", ("no_such_package", "china.jpg"))
    with pytest.raises(ValueError, match="pip install scikit-image scikit-learn"):
        photos.photo_path("china")
    monkeypatch.setitem(photos.FILES, "china", ("sklearn", "china.jpg"))
    with pytest.raises(ValueError, match="photo china must be installed"):
        photos.photo_path("china")
