import itertools
import pickle

import numpy as np
import pytest
from absl import flags
from PIL import Image

from dinosae_jax.data import crops, images, photos


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return {
        "source": "photos/72",
        "data_dir": str(tmp_path_factory.mktemp("tfds")),
        "image_size": 64,
        "crop": "random",
        "resize": 0,
        "flip": True,
        "threads": 2,
        "workers": 0,
    }


@pytest.fixture(scope="module")
def source(config):
    return images.open_images(config, "train")


def take(count, source, config, **options):
    return list(itertools.islice(images.train_batches(source, config, seed=3, **options), count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def join(parts, rows=None):
    """The global batches whose rows (contiguous slices where None) the parts hold."""
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    order = slice(None) if rows is None else np.argsort(np.concatenate(rows))
    return [{name: batch[name][order] for name in batch} for batch in joined]


@pytest.fixture(scope="module")
def reference(source, config):
    """Seven batches, so that they reach into the sixth epoch of ten photos."""
    return take(7, source, config, batch_size=8)


def test_shapes_types_and_labels(reference, source):
    for batch in reference:
        assert batch["image"].shape == (8, 64, 64, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and batch["index"].dtype == np.int64
        np.testing.assert_array_equal(batch["label"], batch["index"])  # a photo is its own class
    assert source.num_classes == len(source) == 10
    assert source.label_names == tuple(photos.FILES)


def test_every_epoch_is_another_permutation(reference):
    order = np.concatenate([batch["index"] for batch in reference])[:50].reshape(5, 10)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(10), (5, 1)))
    assert len({tuple(epoch) for epoch in order}) == 5


def test_crops_of_one_photo_differ_between_epochs(reference):
    pictures = np.concatenate([batch["image"] for batch in reference])
    index = np.concatenate([batch["index"] for batch in reference])
    first = pictures[index == 0]
    assert len({picture.tobytes() for picture in first}) > len(first) // 2


def test_batches_depend_on_seed_and_step_alone(source, config, reference):
    assert_same(take(7, source, config, batch_size=8), reference)
    assert_same(take(3, source, config, batch_size=8, start_step=4), reference[4:])
    assert_same(take(7, source, config | {"threads": 0}, batch_size=8), reference)
    other = next(images.train_batches(source, config, batch_size=8, seed=4))
    assert not np.array_equal(other["image"], reference[0]["image"])


@pytest.mark.parametrize(
    "rows",
    [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 6, 7], [2, 3, 4, 5]]],
    ids=["two", "four", "around a ring"],
)
def test_processes_together_read_the_single_process_batches(source, config, reference, rows):
    parts = [take(7, source, config, batch_size=8, rows=np.array(mine)) for mine in rows]
    assert_same(join(parts, rows), reference)


def test_another_batch_size_reads_the_same_examples(source, config, reference):
    half = take(14, source, config, batch_size=4)
    assert_same(join([half[::2], half[1::2]]), reference)


def test_every_thread_has_an_example_to_read(source, config, monkeypatch):
    asked = []
    real = images.grain.ReadOptions
    monkeypatch.setattr(
        images.grain, "ReadOptions", lambda **given: asked.append(given) or real(**given)
    )
    take(1, source, config | {"threads": 16}, batch_size=2)
    assert asked == [{"num_threads": 16, "prefetch_buffer_size": 32}]


def test_worker_processes_read_the_same_batches(source, config, reference):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])
    assert_same(take(2, source, config | {"workers": 1}, batch_size=8), reference[:2])


def test_small_sets_are_decoded_once_within_the_budget(folder, monkeypatch):
    decoded = []
    decode = crops.decode_rgb
    monkeypatch.setattr(crops, "decode_rgb", lambda data: decoded.append(0) or decode(data))
    source = images.open_images(folder_config(folder), "train")
    rounds = [[source[i]["image"] for i in range(12)] for _ in range(3)]
    np.testing.assert_array_equal(rounds[0][7], rounds[2][7])
    assert len(decoded) == 13  # one more for the first image, when the set was opened
    monkeypatch.setattr(images, "CACHE_BYTES", 12 * 40 * 50 * 3)
    source = images.open_images(folder_config(folder), "train")
    decoded.clear()
    for _ in range(2):
        for i in range(12):  # later images are larger than the first: the last do not fit
            assert source[i]["image"].shape == (40 + i, 50, 3)
    assert 12 < len(decoded) < 20


def test_source_can_be_pickled_after_reading(source):
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


def test_evaluation_reads_every_tile_once_and_pads(config):
    evaluation = images.open_images(config, "eval")
    batches = list(images.eval_batches(evaluation, config, batch_size=10))
    assert [batch["mask"].sum() for batch in batches] == [10, 10, 3]
    index = np.concatenate([batch["index"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(index[mask], np.arange(23))
    pictures = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(pictures[11], evaluation[11]["image"])  # tiles as they are
    rows = [np.array([0, 1, 2, 8, 9]), np.arange(3, 8)]
    parts = [
        list(images.eval_batches(evaluation, config, batch_size=10, rows=mine)) for mine in rows
    ]
    assert_same(join(parts, rows), batches)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def folder_config(folder, **changes):
    fields = {"crop": "center", "image_size": 32, "threads": 1, "workers": 0, "flip": False}
    return {"source": f"folder:{folder}", "data_dir": None, "resize": 0} | fields | changes


def test_crop_kinds(folder):
    config = folder_config(folder)
    source = images.open_images(config, "train")
    batch = next(images.train_batches(source, config, batch_size=4, seed=0))
    for picture, index in zip(batch["image"], batch["index"], strict=True):
        expected = crops.adm_center_crop(source[int(index)]["image"], 32)
        np.testing.assert_array_equal(picture, expected)
    config = folder_config(folder, crop="resize_random", resize=32)
    batch = next(images.train_batches(source, config, batch_size=12, seed=0))
    for picture, index in zip(batch["image"], batch["index"], strict=True):
        resized = crops.resize_short_side(source[int(index)]["image"], 32)
        height, width = resized.shape[0] - 32, resized.shape[1] - 32
        places = [
            resized[i : i + 32, j : j + 32] for i in range(height + 1) for j in range(width + 1)
        ]
        assert any(np.array_equal(picture, place) for place in places)


def test_unreadable_image_is_replaced_counted_and_named(folder, caplog):
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:200])
    config = folder_config(folder)
    source = images.open_images(config, "train")
    batches = list(itertools.islice(images.train_batches(source, config, batch_size=12, seed=0), 2))
    for batch in batches:
        np.testing.assert_array_equal(
            np.bincount(batch["index"], minlength=12), [1, 1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 1]
        )
    assert source.skipped == 1 and "05.png" in caplog.text
    evaluated = next(images.eval_batches(source, config, batch_size=12))
    np.testing.assert_array_equal(evaluated["mask"], np.arange(12) != 5)


def test_too_many_unreadable_images_stop_the_reading(folder):
    for name in ("05.png", "06.png"):
        (folder / name).write_bytes(b"damaged")
    config = folder_config(folder)
    source = images.open_images(config, "train")
    with pytest.raises(ValueError, match=r"got 2 of 12, the last one 0[56]\.png"):
        list(images.eval_batches(source, config, batch_size=4))


def test_a_source_without_any_readable_image_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "only.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"only\.png"):
        images.open_images(folder_config(tmp_path), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "middle"}, "one of random, center, resize_random, random_resized; got 'middle'"),
        ({"image_size": 0}, "image_size must be positive; got 0"),
        ({"crop": "resize_random", "resize": 31}, "got resize 31 and image_size 32"),
    ],
)
def test_wrong_recipes_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        images.open_images(folder_config(folder, **changes), "train")


@pytest.mark.parametrize("crop", ["random", "center", "resize_random"])
@pytest.mark.parametrize("place", [0, 7])
def test_small_images_are_enlarged_wherever_they_stand(folder, caplog, crop, place):
    for number in range(12):
        size = (20, 30) if number == place else (50, 60)
        Image.fromarray(np.full((*size, 3), number, np.uint8)).save(folder / f"{number:02d}.png")
    config = folder_config(folder, crop=crop, resize=32)
    source = images.open_images(config, "train")
    batch = next(images.train_batches(source, config, batch_size=12, seed=0))
    for picture, index in zip(batch["image"], batch["index"], strict=True):
        assert picture.shape == (32, 32, 3) and (picture == index).all()
    assert f"the crop of 32 pixels, as {place:02d}.png of 30 x 20" in caplog.text


def test_rows_that_are_not_of_the_batch_are_refused(source, config):
    with pytest.raises(ValueError, match=r"one of the 8 rows of a batch; got \[7, 8\]"):
        images.train_batches(source, config, batch_size=8, seed=0, rows=np.array([7, 8]))
    with pytest.raises(ValueError, match=r"got \[\]"):
        images.train_batches(source, config, batch_size=0, seed=0)
