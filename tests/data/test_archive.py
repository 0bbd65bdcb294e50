import json

import numpy as np
import pytest
from PIL import Image

from dinosae_jax.data import archive, crops, manifest, sources


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
    with pytest.raises(ValueError, match="holds one with crop 'none' instead of 'adm_center_32"):
        archive.convert_images(f"folder:{tree}", tmp_path / "out", crop_size=32)
    with pytest.raises(ValueError, match="1 <= num_shards <= 9"):
        archive.convert_images(f"folder:{tree}", tmp_path / "more", num_shards=10)


def test_damaged_shards_are_named_and_repaired(tree, tmp_path):
    source, output = f"folder:{tree}", tmp_path / "out"
    written = archive.convert_images(source, output, num_shards=2)
    folder = output / "train"
    shard = folder / written["shards"][1]["name"]
    manifest.check_shards(folder, written, sha256=True)
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"content of .*{shard.name} has changed"):
        manifest.check_shards(folder, written, sha256=True)
    shard.write_bytes(intact[:100])
    with pytest.raises(ValueError, match=f"{shard.name} is missing or has not"):
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
    with pytest.raises(ValueError, match=r"2 of 9 are, the last one class1/1\.jpg"):
        archive.convert_images(f"folder:{tree}", tmp_path / "again")
