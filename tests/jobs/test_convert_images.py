"""The converter as a job; what it writes is tested with `data.archive`."""

import json

import numpy as np
import pytest

from configs import convert_images as convert_config
from dinosae_jax import rules
from dinosae_jax.data import crops, sources
from dinosae_jax.jobs import convert_images
from tests import tiny


def test_a_folder_becomes_an_archive_of_its_crops(tmp_path, capsys):
    tiny.write_images(tmp_path / "images")
    config = convert_config.get_config("tiny")
    config.source, config.crop_size = f"folder:{tmp_path / 'images'}", 32
    rules.validate(config)
    for _ in range(2):  # the second run finds everything there
        convert_images.run(config, tmp_path / "archive")
    assert "train: 3 images in 2 shards" in capsys.readouterr().out
    for split in ("train", "eval"):
        folder = sources.open_records(config.source, split)
        archive = sources.open_records(f"array_record:{tmp_path / 'archive'}", split)
        assert len(archive) == len(folder) == 3
        for index in range(3):
            (ours, label), (original, wanted) = archive.read(index), folder.read(index)
            assert label == wanted
            expected = crops.adm_center_crop(crops.decode_rgb(original), 32)
            np.testing.assert_array_equal(crops.decode_rgb(ours), expected)
        manifest = json.loads((tmp_path / "archive" / split / "manifest.json").read_text())
        assert all(len(shard["sha256"]) == 64 for shard in manifest["shards"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "needs images; got an empty source"),
        ({"splits": ("train", "test")}, "splits must be a known name; got 'test'"),
        ({"num_shards": 0}, "num_shards must be above zero"),
        ({"crop_size": -1}, "crop_size must not be negative; got -1"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    config = convert_config.get_config("tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        rules.validate(config)
