import json

import numpy as np
import pytest
from PIL import Image

from dinosae_jax.data import archive, crops, images, manifest, sources


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(9):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 200, 50 + i)[None, :, None]
        pixels = (ramp + rng.integers(0, 50, (40, 1, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def read_all(source):
    records = sources.open_records(source, "train")
    return [(*records.read(i), records.name(i)) for i in range(len(records))], records


def test_round_trip_keeps_bytes_labels_and_names(tree, tmp_path):
    written = archive.convert_images(f"folder:{tree}", tmp_path / "out", num_shards=4)
    assert written["count"] == 9 and [s["count"] for s in written["shards"]] == [2, 2, 2, 3]
    originals, folder = read_all(f"folder:{tree}")
    copies, archived = read_all(f"array_record:{tmp_path / 'out'}")
    assert [copy[:2] for copy in copies] == [original[:2] for original in originals]
    assert [copy[2].split(":")[1] for copy in copies] == [original[2] for original in originals]
    assert archived.label_names == folder.label_names == ("class0", "class1")


def test_stored_crop_is_the_adm_crop(tree, tmp_path):
    archive.convert_images(f"folder:{tree}", tmp_path / "out", crop_size=32)
    originals, _ = read_all(f"folder:{tree}")
    copies, _ = read_all(f"array_record:{tmp_path / 'out'}")
    for (original, _, _), (copy, _, _) in zip(originals, copies, strict=True):
        np.testing.assert_array_equal(
            crops.decode_rgb(copy), crops.adm_center_crop(crops.decode_rgb(original), 32)
        )


def test_conversion_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    calls = []
    write = archive._write_shard

    def interrupted(path, packed):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path.name)
        return write(path, packed)

    monkeypatch.setattr(archive, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        archive.convert_images(f"folder:{tree}", tmp_path / "out", num_shards=3)
    with pytest.raises(ValueError, match="run the conversion again"):
        sources.open_records(f"array_record:{tmp_path / 'out'}", "train")
    first = (tmp_path / "out/train" / calls[0]).stat().st_mtime_ns
    monkeypatch.setattr(archive, "_write_shard", write)
    archive.convert_images(f"folder:{tree}", tmp_path / "out", num_shards=3)
    assert (tmp_path / "out/train" / calls[0]).stat().st_mtime_ns == first
    straight = archive.convert_images(f"folder:{tree}", tmp_path / "straight", num_shards=3)
    assert json.loads((tmp_path / "out/train/manifest.json").read_text()) == straight
    assert not list((tmp_path / "out/train").glob("partial*"))


def test_another_conversion_in_the_folder_is_refused(tree, tmp_path):
    archive.convert_images(f"folder:{tree}", tmp_path / "out")
    with pytest.raises(ValueError, match=r"one with pixels .*none.* instead of .*adm_center"):
        archive.convert_images(f"folder:{tree}", tmp_path / "out", crop_size=32)
    with pytest.raises(ValueError, match="got 32 and 40; set one of them to 0"):
        archive.convert_images(f"folder:{tree}", tmp_path / "more", crop_size=32, short_side=40)


def test_there_are_no_more_shards_than_images(tree, tmp_path):
    written = archive.convert_images(f"folder:{tree}", tmp_path / "more", num_shards=64)
    assert [shard["count"] for shard in written["shards"]] == [1] * 9


def config_of(source, **changes):
    fields = {"crop": "center", "image_size": 32, "threads": 0, "workers": 0, "flip": False}
    return {"source": source, "data_dir": None, "resize": 0, **fields, **changes}


CROPS = {  # of data configs
    "center": {"crop": "center", "image_size": 32},
    "half": {"crop": "center", "image_size": 16},
    "resize_random": {"crop": "resize_random", "image_size": 32, "resize": 36},
    "enlarged": {"crop": "resize_random", "image_size": 32, "resize": 48},
    "random": {"crop": "random", "image_size": 32},
    "random_resized": {"crop": "random_resized", "image_size": 32},
}


@pytest.mark.parametrize(
    ("stored", "suitable"),
    [
        ({}, set(CROPS)),
        ({"crop_size": 32}, {"center"}),
        ({"short_side": 36}, {"resize_random"}),
    ],
)
def test_an_archive_of_other_pixels_is_refused(tree, tmp_path, stored, suitable):
    """What is not refused has the pixels that the images themselves give."""
    source = f"array_record:{tmp_path / 'out'}"
    archive.convert_images(f"folder:{tree}", tmp_path / "out", **stored)
    for name, crop in CROPS.items():
        if name in suitable:
            both = [
                next(images.train_batches(images.open_images(c, "train"), c, batch_size=9, seed=1))
                for c in (config_of(source, **crop), config_of(f"folder:{tree}", **crop))
            ]
            np.testing.assert_array_equal(both[0]["image"], both[1]["image"])
            continue
        with pytest.raises(ValueError, match="cuts its images from; got") as caught:
            images.open_images(config_of(source, **crop), "train")
        assert "--config.crop_size=0 --config.short_side=0" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_evaluation_wants_the_files_or_its_own_crop(tree, tmp_path):
    for name, stored in {
        "files": {},
        "crops": {"crop_size": 32},
        "short": {"short_side": 36},
    }.items():
        output = tmp_path / name
        archive.convert_images(f"folder:{tree}", output, split="train", holdout=3, **stored)
        archive.convert_images(f"folder:{tree}", output, split="eval", holdout=3, **stored)
        config = config_of(f"array_record:{output}", image_size=32)
        if name == "short":
            with pytest.raises(
                ValueError, match=r"evaluation wants ADM's .* of 32 pixels; convert"
            ):
                images.open_images(config, "eval")
            continue
        assert len(images.open_images(config, "eval")) == 3
        if name == "crops":
            with pytest.raises(ValueError, match=r"--config\.crop_size=16 \(or"):
                images.open_images({**config, "image_size": 16}, "eval")


def test_other_colours_and_unknown_crops_are_refused(tree, tmp_path, monkeypatch):
    archive.convert_images(f"folder:{tree}", tmp_path / "out", crop_size=32)
    config = config_of(f"array_record:{tmp_path / 'out'}")
    monkeypatch.setattr(crops, "COLOUR", "another rule")
    with pytest.raises(ValueError, match="wants ADM's centre crops of 32 pixels, colour 'another"):
        images.open_images(config, "train")
    monkeypatch.undo()
    path = tmp_path / "out/train/manifest.json"
    content = json.loads(path.read_text())
    del content["pixels"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="with 'unknown', where"):
        images.open_images(config, "train")


def test_short_sides_are_reduced_and_never_enlarged(tree, tmp_path):
    archive.convert_images(f"folder:{tree}", tmp_path / "out", short_side=39)
    large = tree / "class0" / "0.jpg"
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(large)
    archive.convert_images(f"folder:{tree}", tmp_path / "mixed", short_side=39)
    copies, _ = read_all(f"array_record:{tmp_path / 'mixed'}")
    originals, _ = read_all(f"folder:{tree}")
    assert copies[0][0] == originals[0][0]  # smaller: the file as it is
    for copy, original in zip(copies[1:], originals[1:], strict=True):
        wanted = crops.resize_short_side(crops.decode_rgb(original[0]), 39)
        np.testing.assert_array_equal(crops.decode_rgb(copy[0]), wanted)


def test_splits_of_an_archive_have_trainings_numbers(tree, tmp_path):
    """Also where each split was converted as a set of its own, with its own numbers."""
    (tmp_path / "part").mkdir()
    (tree / "class1").rename(tmp_path / "part" / "class1")
    archive.convert_images(f"folder:{tmp_path / 'part'}", tmp_path / "one")
    (tmp_path / "part" / "class1").rename(tree / "class1")
    archive.convert_images(f"folder:{tree}", tmp_path / "out")
    (tmp_path / "one" / "train").rename(tmp_path / "out" / "eval")
    held_out = sources.open_records(f"array_record:{tmp_path / 'out'}", "eval")
    assert held_out.label_names == ("class0", "class1") and held_out.read(0)[1] == 1
    path = tmp_path / "out" / "eval" / "manifest.json"
    path.write_text(path.read_text().replace('"class1"', '"class9"'))
    held_out = sources.open_records(f"array_record:{tmp_path / 'out'}", "eval")
    assert held_out.read(0)[1] == -1 and "the first class9" in held_out.unlabelled


def test_damaged_shards_are_named_and_repaired(tree, tmp_path):
    source, output = f"folder:{tree}", tmp_path / "out"
    written = archive.convert_images(source, output, num_shards=2)
    folder = output / "train"
    shard = folder / written["shards"][1]["name"]
    manifest.check_shards(folder, written, sha256=True)
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{shard.name}.* content has changed"):
        manifest.check_shards(folder, written, sha256=True)
    shard.write_bytes(intact[:100])
    with pytest.raises(ValueError, match=f"{shard.name}, which is missing or has not"):
        sources.open_records(f"array_record:{output}", "train")
    archive.convert_images(source, output, num_shards=2)
    assert shard.read_bytes() == intact
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON object"):
        sources.open_records(f"array_record:{output}", "train")


def test_unreadable_images_are_left_out_and_limited(tree, tmp_path):
    (tree / "class0" / "2.jpg").write_bytes(b"\xff\xd8 no image")
    written = archive.convert_images(f"folder:{tree}", tmp_path / "out")
    assert written["count"] == 8 and written["shards"][0]["skipped"] == ["class0/2.jpg"]
    (tree / "class1" / "1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got 2 of 9, the last one class1/1\.jpg"):
        archive.convert_images(f"folder:{tree}", tmp_path / "again")
