"""The converter as a job; what it writes is tested with `data.archive`."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import convert_images as convert_config
from configs import rfm_dit, sae_stage1
from dinosae_jax import rules
from dinosae_jax.data import crops, images, sources
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


SYNSETS = ("n01440764", "n01443537", "n02102040")


def encoded(value, height=60, width=80):
    """A JPEG whose grey tells which image it is."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet as it is published, small: grey 20 + 40 i is class i; and the validation's list."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for number in (2, 0, 1):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for each in range(2):
                    add(tar, f"{SYNSETS[number]}_{each}.JPEG", encoded(20 + 40 * number))
            add(outer, f"{SYNSETS[number]}.tar", inner.getvalue())
    order = [1, 2, 1, 0, 2]
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for place in reversed(range(5)):  # names are in order, their places in the tar need not be
            value = 20 + 40 * order[place]
            add(tar, f"ILSVRC2012_val_{place + 1:08d}.JPEG", encoded(value, 40, 40))
    (tmp_path / "val_synsets.txt").write_text("".join(f"{SYNSETS[each]}\n" for each in order))
    return tmp_path


def conversion(folder, variant="sae", **changes):
    config = convert_config.get_config(variant)
    config.source = f"tar:{folder}/ILSVRC2012_img_{{split}}.tar"
    config.eval_synsets = str(folder / "val_synsets.txt")
    config.update({"threads": 2, "short_side": 48, "crop_size": 32, **changes})
    rules.validate(config)
    return config


def data_of(folder, **changes):
    fields = {"crop": "resize_random", "image_size": 32, "resize": 48, "flip": False}
    return {"source": f"array_record:{folder}", **fields, "threads": 0, **changes}


def test_imagenet_as_it_is_published_has_a_recipe(imagenet):
    convert_images.run(conversion(imagenet), imagenet / "archive")
    for split, count in (("train", 6), ("eval", 5)):
        source = images.open_images(data_of(imagenet / "archive"), split, labelled=True)
        assert source.label_names == SYNSETS and len(source) == count
        for index in range(count):
            example = source[index]
            assert round((example["image"].mean() - 20) / 40) == example["label"]
            assert min(example["image"].shape[:2]) == (48 if split == "train" else 32)


def test_a_flat_validation_split_without_its_list_has_no_labels(imagenet, capsys):
    convert_images.run(conversion(imagenet, eval_synsets=""), imagenet / "archive")
    assert "ILSVRC2012_img_val.tar has no class folders" in capsys.readouterr().out
    for source in (f"array_record:{imagenet}/archive", conversion(imagenet).source):
        config = data_of("", source=source)
        assert len(images.open_images(config, "eval")) == 5  # an autoencoder needs no labels
        with pytest.raises(ValueError, match=r"labels are needed.*configs/convert_images\.py"):
            images.open_images(config, "eval", labelled=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\n" * 4, "got 4 names in .* for 5 images"),
        ("n01440764\n" * 4 + "n09999999", "got 'n09999999' as number 5"),
        ("490\n361\n171\n822\n297\n", "got '490' as number 1 .*, a number, whose order"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(imagenet, text, message):
    (imagenet / "val_synsets.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        convert_images.run(conversion(imagenet), imagenet / "archive")
    assert "\n" not in str(caught.value)


def test_a_list_beside_class_folders_is_refused(tmp_path):
    tiny.write_images(tmp_path)
    (tmp_path / "list.txt").write_text("one\n" * 3)
    config = convert_config.get_config("tiny")
    config.source, config.eval_synsets = f"folder:{tmp_path}", str(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="because its images lie in class folders"):
        convert_images.run(config, tmp_path / "archive")


def test_the_variant_of_the_stages_suits_them():
    config = convert_config.get_config("sae")
    stage = sae_stage1.get_config().data
    assert (stage.crop, stage.resize, stage.image_size) == (
        "resize_random",
        config.short_side,
        config.crop_size,
    )
    flow = rfm_dit.get_config().data
    assert (flow.crop, flow.image_size) == ("center", convert_config.get_config("flow").crop_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "needs images; got an empty source"),
        ({"splits": ("train", "test")}, "splits must be a known name; got 'test'"),
        ({"num_shards": 0}, "num_shards must be above zero"),
        ({"crop_size": -1}, "crop_size must not be negative; got -1"),
        ({"short_side": -1}, "short_side must not be negative; got -1"),
        ({"eval_synsets": "x", "splits": ("train",)}, "labels the split eval; got splits without"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    config = convert_config.get_config("tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        rules.validate(config)
