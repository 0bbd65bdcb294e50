import io
import os
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from dinosae_jax.data import sources


def png(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root, tree):
    """A folder of images from {relative path: pixel value}."""
    for name, value in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))


def write_tar(path, tree, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, value in tree.items():
            content = png(value)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def contents(records):
    """{name: (red value, label)} of every image."""
    found = {}
    for index in range(len(records)):
        encoded, label = records.read(index)
        found[records.name(index)] = Image.open(io.BytesIO(encoded)).getpixel((0, 0))[0], label
    return found


def test_class_folders(tmp_path):
    write_tree(tmp_path, {"dog/2.png": 2, "cat/1.PNG": 1, "dog/deep/3.png": 3, "dog/.4.png": 4})
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    records = sources.open_records(f"folder:{tmp_path}", "train")
    assert records.label_names == ("cat", "dog")
    assert contents(records) == {"cat/1.PNG": (1, 0), "dog/2.png": (2, 1), "dog/deep/3.png": (3, 1)}


def test_flat_folder_is_one_class(tmp_path):
    write_tree(tmp_path, {"b.png": 2, "a.png": 1})
    records = sources.open_records(f"folder:{tmp_path}", "train")
    assert records.label_names == (tmp_path.name,)
    assert contents(records) == {"a.png": (1, 0), "b.png": (2, 0)}


def test_train_and_val_folders_are_the_splits(tmp_path):
    write_tree(tmp_path, {"train/x/1.png": 1, "val/x/2.png": 2})
    assert contents(sources.open_records(f"folder:{tmp_path}", "train")) == {"x/1.png": (1, 0)}
    assert contents(sources.open_records(f"folder:{tmp_path}", "eval")) == {"x/2.png": (2, 0)}


def test_holdout_divides_a_set_without_splits(tmp_path):
    write_tree(tmp_path, {f"{i}.png": i for i in range(10)})
    name = f"folder:{tmp_path}"
    parts = {split: sources.open_records(name, split, holdout=4) for split in ("train", "eval")}
    assert sorted(contents(parts["eval"])) == ["0.png", "4.png", "8.png"]
    assert len(parts["train"]) == 7
    assert not set(contents(parts["train"])) & set(contents(parts["eval"]))
    assert parts["train"].fingerprint != parts["eval"].fingerprint
    with pytest.raises(ValueError, match="keep every tenth"):
        sources.open_records(name, "eval")
    with pytest.raises(ValueError, match="2 <= n <= 10 here; got 11"):
        sources.open_records(name, "eval", holdout=11)


def test_fingerprint_follows_names_and_sizes(tmp_path):
    write_tree(tmp_path, {"a.png": 1, "b.png": 2})
    name = f"folder:{tmp_path}"
    before = sources.open_records(name, "train").fingerprint
    assert sources.open_records(name, "train").fingerprint == before
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert sources.open_records(name, "train").fingerprint != before


def test_tars_take_classes_from_folders_inside_or_from_their_names(tmp_path):
    write_tar(tmp_path / "all.tar", {"./train/dog/1.png": 1, "./train/cat/2.png": 2})
    records = sources.open_records(f"tar:{tmp_path}/all.tar", "train")
    assert records.label_names == ("cat", "dog")
    assert sorted(contents(records).values()) == [(1, 1), (2, 0)]
    write_tar(tmp_path / "n01.tar", {"b.png": 3, "a.png": 4, "notes.txt": 0})
    write_tar(tmp_path / "n02.tar", {"c.png": 5})
    records = sources.open_records(f"tar:{tmp_path}/n0*.tar", "train")
    assert records.label_names == ("n01", "n02")
    assert list(contents(records).values()) == [(4, 0), (3, 0), (5, 1)]


def test_tars_of_a_folder_packed_as_a_dot_are_classes_by_their_names(tmp_path):
    """`tar -cf n01.tar -C n01 .`"""
    write_tar(tmp_path / "n01.tar", {"./a.png": 1})
    write_tar(tmp_path / "n02.tar", {"./b.png": 2, "./deep/../c.png": 3})
    records = sources.open_records(f"tar:{tmp_path}/n0*.tar", "train")
    assert records.label_names == ("n01", "n02")
    assert list(contents(records).values()) == [(1, 0), (2, 1), (3, 1)]


def test_tar_splits(tmp_path):
    write_tar(tmp_path / "train.tar", {"x/1.png": 1})
    write_tar(tmp_path / "val.tar", {"x/2.png": 2})
    evaluation = sources.open_records(f"tar:{tmp_path}/{{split}}.tar", "eval")
    assert contents(evaluation) == {"val.tar/x/2.png": (2, 0)}


def test_wrong_tars_are_refused_in_one_line(tmp_path):
    write_tar(tmp_path / "packed.tar", {"1.png": 1}, "w:gz")
    (tmp_path / "text.tar").write_text("no tar file at all" * 100)
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "packed.tar", "n01.tar")
    (tmp_path / "empty.tar").touch()
    write_tar(tmp_path / "noimages.tar", {"readme.txt": 1})
    for name, message in {
        "packed": "must be an uncompressed tar",
        "text": "must be an uncompressed tar",
        "empty": "must be an uncompressed tar|must hold images",
        "outer": "holds further tar files",
        "noimages": "holds none that end in",
        "missing": "nothing matches",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_records(f"tar:{tmp_path}/{name}.tar", "train")
        assert "\n" not in str(caught.value)


def test_wrong_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "half" / "train").mkdir(parents=True)
    write_tree(tmp_path / "mixed", {"stray.png": 1, "cat/1.png": 2})
    for source, split, message in [
        (f"folder:{tmp_path}/nowhere", "train", "must be readable; got .*nowhere"),
        (f"folder:{tmp_path}/file", "train", "must be readable; got .*file"),
        (f"folder:{tmp_path}/empty", "train", "holds none that end in"),
        (f"folder:{tmp_path}/half", "eval", "none of eval, val, validation, test"),
        (f"folder:{tmp_path}/mixed", "train", "mixed holds both, stray.png and those in cat"),
        ("imagenet", "train", "'tfds:NAME'"),
        ("folder:", "train", "'tfds:NAME'"),
        ("photos/99", "train", "got photos/99"),
        ("tfds:no_such_set", "train", "file_format='array_record'"),
        ("tfds:imagenet2012", "train", "file_format='array_record'"),
        (f"array_record:{tmp_path}/empty", "train", "manifest.json"),
        ("photos/112", "test", "'train' or 'eval'; got 'test'"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_records(source, split, data_dir=str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folder_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match="Permission denied"):
        sources.open_records(f"folder:{tmp_path}/locked", "train")


def test_imagenet_of_tensorflow_datasets(tmp_path, monkeypatch):
    """The registered builder, its own features and splits, filled with a few images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("imagenet2012", data_dir=tmp_path, file_format="array_record")

    def examples(count):
        for i in range(count):
            yield (
                f"{i}.JPEG",
                {"file_name": f"{i}.JPEG", "image": io.BytesIO(png(i)), "label": 999 - i},
            )

    monkeypatch.setattr(
        type(builder),
        "_split_generators",
        lambda self, _: {"train": examples(5), "validation": examples(2)},
    )
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    train = sources.open_records("tfds:imagenet2012", "train", data_dir=str(tmp_path))
    assert len(train) == 5 and len(train.label_names) == 1000
    assert set(contents(train).values()) == {(i, 999 - i) for i in range(5)}
    evaluation = sources.open_records("tfds:imagenet2012", "eval", data_dir=str(tmp_path))
    assert set(contents(evaluation).values()) == {(0, 999), (1, 998)}
    assert train.fingerprint != evaluation.fingerprint


def test_a_tfds_set_without_images_is_refused(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.testing.mock_data(num_examples=2), pytest.raises(ValueError, match="image and label"):
        sources.open_records("tfds:imdb_reviews", "train", data_dir=str(tmp_path))


def test_a_tfds_set_whose_label_is_a_number_is_refused(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    with pytest.raises(ValueError, match="must be a class; that of ages is Scalar"):
        sources.open_records("tfds:ages", "train", data_dir=str(tmp_path))


def test_reading_a_file_that_became_shorter_raises_oserror_on_decoding(tmp_path):
    from dinosae_jax.data import crops

    write_tree(tmp_path, {"a.png": 1})
    records = sources.open_records(f"folder:{tmp_path}", "train")
    (tmp_path / "a.png").write_bytes(png(1)[:30])
    with pytest.raises(OSError):
        crops.decode_rgb(records.read(0)[0])
    np.testing.assert_array_equal(records.labels, [0])
