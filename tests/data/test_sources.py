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
    write_tree(tmp_path, {"train/x/1.png": 1, "val/x/2.png": 2, "misc/3.png": 3, "stray.png": 4})
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


def write_both(folder, tree):
    """The same tree as a folder and as a tar of it; yields their sources."""
    write_tree(folder / "tree", tree)
    write_tar(folder / "tree.tar", tree)
    return f"folder:{folder}/tree", f"tar:{folder}/tree.tar"


@pytest.mark.parametrize(
    ("tree", "train", "evaluation"),
    [
        (("train/a/1.png", "train/b/2.png", "val/b/3.png"), {"a": 0, "b": 1}, {"b": 1}),
        (("x/train/a/1.png", "x/val/a/3.png"), {"a": 0}, {"a": 0}),
        (("train/a/images/1.png", "train/b/images/2.png"), {"a": 0, "b": 1}, None),
        (("x/a/1.png", "x/b/deep/er/2.png"), {"a": 0, "b": 1}, None),
        (("a/images/1.png",), {"a": 0}, None),
        (("test/1.png", "zoo/2.png"), {"test": 0, "zoo": 1}, None),
        (("Train/a/1.png", "Train/b/2.png", "Valid/b/3.png"), {"a": 0, "b": 1}, {"b": 1}),
        (("train/a/1.png", "valid/a/2.png", "test/3.png"), {"a": 0}, {"a": 0}),
        (("a/1.png", "__MACOSX/a/2.png", "a/@eaDir/1.png/3.png", ".x/4.png"), {"a": 0}, None),
    ],
)
def test_a_tree_has_the_same_classes_and_splits_as_folder_and_as_tar(
    tmp_path, tree, train, evaluation
):
    tree = {name: number for number, name in enumerate(tree)}
    for source in write_both(tmp_path, tree):
        for split, wanted in (("train", train), ("eval", evaluation)):
            if wanted is None:
                with pytest.raises(ValueError, match=r"data\.holdout=10"):
                    sources.open_records(source, split)
                continue
            records = sources.open_records(source, split)
            assert records.label_names == tuple(train) and not records.unlabelled
            assert {
                next(name for name in train if f"{name}/" in image): label
                for image, (_, label) in contents(records).items()
            } == wanted


@pytest.mark.parametrize(
    ("tree", "reason", "classes"),
    [
        (("train/a/1.png", "train/b/2.png", "val/3.png"), "val has no class folders", ("a", "b")),
        (("train/a/1.png", "val/a/2.png", "val/c/3.png"), "not, the first c", ("a",)),
        (("train/1.png", "val/a/2.png"), "1 classes that training has not", ()),
        (("val/a/2.png",), "val has no folder train beside it", ()),
    ],
)
def test_labels_that_training_does_not_number_are_not_known(
    tmp_path, capsys, tree, reason, classes
):
    tree = {name: number for number, name in enumerate(tree)}
    for source in write_both(tmp_path, tree):
        records = sources.open_records(source, "eval")
        assert {label for _, label in contents(records).values()} == {-1}
        assert reason in records.unlabelled and reason in capsys.readouterr().out
        assert records.label_names == classes
        with pytest.raises(ValueError, match=r"--config\.eval_synsets=FILE") as caught:
            sources.require_labels(records, "eval")
        assert "\n" not in str(caught.value)


def test_flat_splits_are_one_class(tmp_path):
    write_tree(tmp_path, {"train/1.png": 1, "val/2.png": 2})
    for split in ("train", "eval"):
        records = sources.open_records(f"folder:{tmp_path}", split)
        assert records.label_names == ("train",)
        assert [label for _, label in contents(records).values()] == [0]
        sources.require_labels(records, split)


def test_a_folder_train_that_may_be_a_class_is_refused(tmp_path):
    write_tree(tmp_path, {"bus/1.png": 1, "train/2.png": 2})
    with pytest.raises(ValueError, match=r"without val, and with .*bus"):
        sources.open_records(f"folder:{tmp_path}", "train")
    (tmp_path / "other").mkdir()
    write_tree(tmp_path / "other", {"val/a/1.png": 1})
    with pytest.raises(ValueError, match=r"got .*other with val; add train"):
        sources.open_records(f"folder:{tmp_path}/other", "train")


def test_what_is_left_out_is_said_in_one_line(tmp_path, capsys):
    write_tree(tmp_path, {"a/1.png": 1, "a/.2.png": 2, "b/.ipynb_checkpoints/3.png": 3})
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "lost.png").symlink_to(tmp_path / "nowhere")
    records = sources.open_records(f"folder:{tmp_path}", "train")
    assert records.label_names == ("a",) and list(contents(records)) == ["a/1.png"]
    (line,) = capsys.readouterr().out.splitlines()
    for part in (
        "1 images, 1 classes; left out: ",
        "folders without images: 1 (b)",
        "tool's: 2 (a/.2.png, ...)",
        "files that are not named as images are: 2 (a/notes.txt, ...)",
        "links to a folder above them: 1 (a/up)",
        "links to nothing: 1 (a/lost.png)",
    ):
        assert part in line
    (tmp_path / "a" / "itself.png").symlink_to("itself.png")
    with pytest.raises(ValueError, match=r"1% of .* links to nothing; got 2 beside 1 images"):
        sources.open_records(f"folder:{tmp_path}", "train")


def test_links_are_followed_and_lost_folders_are_refused(tmp_path):
    write_tree(tmp_path, {"else/z.png": 1, "set/a/1.png": 2, "set/b/2.png": 3})
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "else")
    source = f"folder:{tmp_path}/set"
    assert list(contents(sources.open_records(source, "train"))) == [
        "a/1.png",
        "a/more/z.png",
        "b/2.png",
    ]
    (tmp_path / "set" / "c").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"got .*set/c -> .*nowhere, which cannot be reached"):
        sources.open_records(source, "train")


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path, capsys):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(place)
    for name in (b"\xff.png", b"two\nlines.png"):
        with open(place + b"/" + name, "wb") as file:
            file.write(png(7))
    with tarfile.open(tmp_path / "all.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(place.decode("utf-8", "surrogateescape"), "caf\udce9")
    for source in (f"folder:{tmp_path}", f"tar:{tmp_path}/all.tar"):
        records = sources.open_records(source, "train")
        names = [name.removeprefix("all.tar/") for name in contents(records)]
        assert sorted(names) == [r"caf\xe9/\xff.png", r"caf\xe9/two\nlines.png"]
        assert records.label_names == (r"caf\xe9",)
        print(*names)


def test_a_whole_folder_has_no_splits(tmp_path):
    write_tree(tmp_path, {"train/a.png": 1, "holiday/b.png": 2, "c.png": 3, ".d/e.png": 4})
    assert contents(sources.open_folder(tmp_path)) == {
        "c.png": (3, 0),
        "holiday/b.png": (2, 0),
        "train/a.png": (1, 0),
    }


def test_a_tar_of_tars_is_read_where_it_lies(tmp_path):
    """As ImageNet's training set is published."""
    for number, name in enumerate(("n02", "n01")):
        write_tar(tmp_path / f"{name}.tar", {f"{name}_1.JPEG": number, f"{name}_2.JPEG": number})
    with tarfile.open(tmp_path / "img_train.tar", "w") as tar:
        for name in ("n02", "n01"):
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    write_tar(tmp_path / "img_val.tar", {"val_1.JPEG": 1, "val_2.JPEG": 0})
    records = sources.open_records(f"tar:{tmp_path}/img_{{split}}.tar", "train")
    assert records.label_names == ("n01", "n02")
    assert contents(records) == {
        "img_train.tar/n01.tar/n01_1.JPEG": (1, 0),
        "img_train.tar/n01.tar/n01_2.JPEG": (1, 0),
        "img_train.tar/n02.tar/n02_1.JPEG": (0, 1),
        "img_train.tar/n02.tar/n02_2.JPEG": (0, 1),
    }
    held_out = sources.open_records(f"tar:{tmp_path}/img_{{split}}.tar", "eval")
    assert held_out.label_names == ("n01", "n02") and "no class folders" in held_out.unlabelled


def test_names_of_tars_without_their_split_are_classes(tmp_path):
    for name in ("train_n01", "train_n02", "val_n02"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": 1})
    write_tar(tmp_path / "val_n01.tar", {"n01/x.png": 2})
    for split, labels in (("train", [0, 1]), ("eval", [0, 1])):
        records = sources.open_records(f"tar:{tmp_path}/{{split}}_*.tar", split)
        assert records.label_names == ("n01", "n02")
        assert [label for _, label in contents(records).values()] == labels


def test_links_and_repeated_members_of_tars_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "all.tar", {"a/1.png": 1, "a/2.png": 2})
    with tarfile.open(tmp_path / "all.tar", "a") as tar:
        again, link = tarfile.TarInfo("a/1.png"), tarfile.TarInfo("a/3.png")
        again.size, link.type, link.linkname = len(png(9)), tarfile.LNKTYPE, "a/2.png"
        tar.addfile(again, io.BytesIO(png(9)))
        tar.addfile(link)
    records = sources.open_records(f"tar:{tmp_path}/all.tar", "train")
    assert [value for value, _ in contents(records).values()] == [9, 2]
    printed = capsys.readouterr().out
    assert "sparse files in a tar: 1 (a/3.png)" in printed
    assert "a later member of that name: 1 (a/1.png)" in printed


def test_a_tar_whose_name_is_a_pattern_is_found(tmp_path):
    write_tar(tmp_path / "set [1].tar", {"a/1.png": 1})
    assert len(sources.open_records(f"tar:{tmp_path}/set [1].tar", "train")) == 1


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
    whole = tmp_path / "whole.tar"
    write_tar(whole, {f"n0{i}/{i}.png": i for i in range(20)})
    content = whole.read_bytes()
    block = content.index(b"n013/13.png")  # the header of the fourteenth image
    (tmp_path / "cut.tar").write_bytes(content[:block])
    (tmp_path / "cutinside.tar").write_bytes(content[: block + 600])
    (tmp_path / "damaged.tar").write_bytes(content[:block] + b"x" * 90 + content[block + 90 :])
    for name, message in {
        "packed": "a whole, uncompressed tar file",
        "text": "a whole, uncompressed tar file",
        "empty": "a whole, uncompressed tar file",
        "outer": "a whole, uncompressed tar file",
        "cut": "damaged or ends too early",
        "cutinside": "a whole, uncompressed tar file",
        "damaged": "damaged or ends too early",
        "noimages": r"with none; left out: files .* as images are: 1 \(readme\.txt\); check",
        "missing": "matches nothing",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_records(f"tar:{tmp_path}/{name}.tar", "train")
        assert "\n" not in str(caught.value)


def test_wrong_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_tree(tmp_path / "half", {"train/a/1.png": 1})
    write_tree(tmp_path / "mixed", {"stray.png": 1, "cat/1.png": 2})
    for source, split, message in [
        (f"folder:{tmp_path}/nowhere", "train", "must be readable; got .*nowhere"),
        (f"folder:{tmp_path}/file", "train", "must be readable; got .*file"),
        (f"folder:{tmp_path}/empty", "train", "must hold images that end in .* with none; check"),
        (f"folder:{tmp_path}/half", "eval", "none of eval, val, valid, validation, test"),
        (f"folder:{tmp_path}/mixed", "train", "mixed with both, stray.png and those in cat"),
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
    with pytest.raises(ValueError, match="must be a class; got Scalar in ages"):
        sources.open_records("tfds:ages", "train", data_dir=str(tmp_path))


def test_reading_a_file_that_became_shorter_raises_oserror_on_decoding(tmp_path):
    from dinosae_jax.data import crops

    write_tree(tmp_path, {"a.png": 1})
    records = sources.open_records(f"folder:{tmp_path}", "train")
    (tmp_path / "a.png").write_bytes(png(1)[:30])
    with pytest.raises(OSError):
        crops.decode_rgb(records.read(0)[0])
    np.testing.assert_array_equal(records.labels, [0])
