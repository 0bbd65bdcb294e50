"""Opening an image set by its name: which files it has, their labels, and its splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from dinosae_jax import rules
from dinosae_jax.data import folder_tree, tar_tree, tree
from dinosae_jax.data.manifest import MANIFEST, check_shards, local_shards, read_manifest
from dinosae_jax.data.records import (
    LARGEST_BAD_PART,
    ArchiveRecords,
    FileRecords,
    Records,
    Subset,
    TfdsRecords,
    fingerprint_of,
)
from dinosae_jax.data.tree import EXTENSIONS, SPLIT_NAMES
from dinosae_jax.runtime import buckets, console, files, snapshots

SYNSETS = (
    "put each image into a folder of its class, or convert the set with configs/convert_images.py "
    "and --config.eval_synsets=FILE, a list of the classes of its images"
)


def open_records(
    source: str, split: str, *, data_dir: str | None = None, holdout: int = 0
) -> Records:
    """Opens one split of an image set.

    Args:
      source: 'photos/<side>', 'tfds:<name>', 'folder:<path>', 'tar:<pattern>' or
        'array_record:<path>'.
      split: 'train' or 'eval'. A tensorflow-datasets set answers 'eval' with its split eval, val,
        validation or test. A folder, a tar or an archive answers with its folder of such a name, a
        tar pattern with {split} in it by replacing that with such a name. `tree` has the rules.
      data_dir: tensorflow-datasets folder, None for its default.
      holdout: where the set has no splits of its own, every holdout-th image (by sorted name) is
        'eval' and the others are 'train'. With 0, 'train' is everything and there is no 'eval'.

    Raises:
      ValueError: the set cannot be found, read, or has no such split or no images.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"a split is 'train' or 'eval'; got {split!r}; take one of these")
    records, has_splits, left_out = _open(source, split, data_dir)
    if len(records) == 0:
        found = f"; left out: {left_out}" if left_out else ""
        raise ValueError(
            f"an image source must hold images that end in {' '.join(sorted(EXTENSIONS))}; got "
            f"{source} ({split}) with none{found}; check the path"
        )
    _report(f"{source} ({split})", records, left_out)
    return records if has_splits else _held_out(records, source, split, holdout)


def open_folder(path: str | os.PathLike) -> Records:
    """Opens every image of a folder, at any depth: no classes, no splits.

    Raises:
      ValueError: a folder cannot be read, or there are no images.
    """
    root = folder_tree.open_folder(os.fspath(path))
    left_out = tree.LeftOut()
    found = [(0, name, image) for name, image in tree.images_below(root, "", left_out)]
    if not found:
        raise ValueError(
            f"a folder of images must hold images that end in {' '.join(sorted(EXTENSIONS))}; got "
            f"{root.place} with none{f'; left out: {left_out}' if left_out else ''}; check the path"
        )
    records = _file_records(found, (files.absolute(files.path(path)).name,), (), "")
    _report(root.place, records, left_out)
    return records


def require_labels(records: Records, split: str) -> None:
    """Raises ValueError where the labels of a split are not known."""
    if records.unlabelled:
        raise ValueError(
            "labels are needed, and every split takes the classes of training by their names; got "
            f"{split} without labels, because {records.unlabelled}; {SYNSETS}"
        )


def with_synsets(records: Records, path: str | os.PathLike) -> Records:
    """Returns a split without class folders, labelled by a list of its images' classes.

    Args:
      records: the split, its images in the order of their names.
      path: a text file with the class of one image in each line, a name among training's classes:
        for ImageNet's ILSVRC2012_img_val.tar the 50,000 synsets of its images.

    Raises:
      ValueError: labels are known already, the classes of training are not, or a line of the list
        is none of them.
    """
    if not isinstance(records, FileRecords) or not records.unlabelled or not records.label_names:
        reason = records.unlabelled or "its images lie in class folders"
        raise ValueError(
            "a list of synsets labels a split without class folders beside a training split with "
            f"them; got another one, because {reason}; leave eval_synsets empty, or give both "
            "splits"
        )
    names = files.path(path).read_text().split()
    if len(names) != len(records):
        raise ValueError(
            f"a list of synsets names the class of each image in a line; got {len(names)} names "
            f"in {path} for {len(records)} images; take the list of this split"
        )
    label_of = {name: label for label, name in enumerate(records.label_names)}
    unknown = next((place for place, name in enumerate(names) if name not in label_of), None)
    if unknown is not None:
        numbers = ", a number, whose order is not that of the synsets"
        raise ValueError(
            "a list of synsets names classes of training, such as "
            f"{records.label_names[0]}; got {names[unknown]!r} as number {unknown + 1} in {path}"
            f"{numbers if names[unknown].isdecimal() else ''}; take a list of synsets"
        )
    labels = np.asarray([label_of[name] for name in names], np.int32)
    fingerprint = fingerprint_of([records.fingerprint, *names])
    return dataclasses.replace(records, labels=labels, unlabelled="", fingerprint=fingerprint)


def _report(title: str, records: Records, left_out: tree.LeftOut) -> None:
    """Says in one line what a listing left out, and that labels are not known."""
    bad, _ = left_out.get(tree.DANGLING, (0, ""))
    if bad > max(1, LARGEST_BAD_PART * len(records)):
        raise ValueError(
            f"at most 1% of the images may be links to nothing; got {bad} beside {len(records)} "
            f"images in {title}, the first {left_out[tree.DANGLING][1]}; restore what they link to"
        )
    notes = [f"left out: {left_out}"] if left_out else []
    if records.unlabelled:
        notes.append(f"labels are not known, because {records.unlabelled}")
    if notes:
        classes = len(records.label_names)
        console.report(f"{title}: {len(records):,} images, {classes:,} classes; {'; '.join(notes)}")


def _open(source: str, split: str, data_dir: str | None) -> tuple[Records, bool, tree.LeftOut]:
    """The records of a split and True, or of a whole set that has no splits and False."""
    rules.check_url("an image source", source)
    kind, _, place = source.partition(":")
    if source.startswith("photos/"):
        from dinosae_jax.data import photos

        data_dir = photos.prepare(data_dir, source.removeprefix("photos/"))
        return *_open_tfds(source, split, data_dir), tree.LeftOut()
    if kind == "tfds" and place:
        return *_open_tfds(place, split, data_dir), tree.LeftOut()
    if kind == "tar" and place:
        return _open_tree(_tar_part(place, split))
    if kind == "folder" and place:
        root = tree.unwrap(folder_tree.open_folder(place))
        return _open_tree(tree.find_split(root, split))
    if kind == "array_record" and place:
        return *_open_archive(files.path(place), split), tree.LeftOut()
    raise ValueError(
        "an image source is 'photos/112', 'tfds:NAME', 'folder:PATH', 'tar:PATTERN' or "
        f"'array_record:PATH'; got {source!r}; name one of these"
    )


def _held_out(records: Records, source: str, split: str, holdout: int) -> Records:
    """The images of a set without splits that the rule of `holdout` gives to `split`."""
    if not holdout:
        if split == "eval":
            raise ValueError(
                "evaluation needs images that are kept out of training; got "
                f"{source}, which has none of {', '.join(SPLIT_NAMES['eval'])}; pass "
                "--config.data.holdout=10 (of convert_images: --config.holdout=10) to keep every "
                "tenth image out of training, or make folders train and val"
            )
        return records
    if not 2 <= holdout <= len(records):
        raise ValueError(
            "data.holdout keeps every n-th image out of training, 2 <= n <= "
            f"{len(records)} here; got {holdout}; change it"
        )
    held = np.arange(len(records)) % holdout == 0
    indices = np.flatnonzero(held if split == "eval" else ~held)
    fingerprint = fingerprint_of([records.fingerprint, split, holdout])
    return Subset(records, indices, fingerprint)


def _open_tree(part: tree.Part) -> tuple[FileRecords, bool, tree.LeftOut]:
    """The images of a split of a folder or of tars, with training's numbers of their classes."""
    own = tree.class_folders(part.node)
    names, unlabelled = tree.label_names(part, own)
    label_of = {} if unlabelled else {name: label for label, name in enumerate(names)}
    left_out = tree.LeftOut(part.left_out)
    found = []
    for path, image in tree.images_below(part.node, "", left_out):
        label = label_of.get(path.partition("/")[0], -1) if own else -1 if unlabelled else 0
        found.append((label, path, image))
    for name in sorted(part.node.contents.folders.keys() - own.keys()):
        left_out.add(tree.EMPTY, tree.printable(name))
    return _file_records(found, names, own, unlabelled), part.has_splits, left_out


def _file_records(
    found: list[tuple[int, str, tree.Image]],
    names: Sequence[str],
    classes: Iterable[str],
    unlabelled: str,
) -> FileRecords:
    """Records of (label, path below the split, image); `classes` are those of the folders."""
    found.sort(key=lambda each: each[2].key or (each[1].partition("/")[0], each[1]))
    labels, paths, images = zip(*found, strict=True) if found else ((), (), ())
    files = list(dict.fromkeys(image.file for image in images))
    number_of = {file: number for number, file in enumerate(files)}
    sizes = [os.path.getsize(image.file) if image.size < 0 else image.size for image in images]
    shown = [image.name or tree.printable(path) for path, image in zip(paths, images, strict=True)]
    return FileRecords(
        names=shown,
        files=files,
        file_of=np.asarray([number_of[image.file] for image in images], np.int32),
        offsets=np.asarray([image.offset for image in images], np.int64),
        sizes=np.asarray(sizes, np.int64),
        labels=np.asarray(labels, np.int32),
        label_names=tuple(tree.printable(name) for name in names),
        fingerprint=fingerprint_of(
            [*map(tree.printable, classes), *zip(shown, sizes, strict=True)]
        ),
        unlabelled=unlabelled,
    )


def _tar_part(pattern: str, split: str) -> tree.Part:
    """The split of some tar files, which {split} in their pattern or folders in them tell."""
    if "{split}" not in pattern:
        tars = files.matching(pattern)
        if not tars:
            raise ValueError(
                f"a tar source must name tar files; got {pattern}, which matches nothing; check "
                "the path"
            )
        return tree.find_split(tree.unwrap(tar_tree.open_tars(tars)), split)
    node = _split_tars(pattern, split)
    if node is None:
        raise ValueError(
            f"a tar source must name tar files; got {pattern}, which matches nothing with {{split}}"
            f" as {' or '.join(SPLIT_NAMES[split])}; check the path"
        )
    training = node if split == "train" else _split_tars(pattern, "train")
    return tree.Part(node, training, True, tree.LeftOut())


def _split_tars(pattern: str, split: str) -> tree.Node | None:
    """The tree of the tars of a split, below a folder of the split's name where they have one."""
    for name in SPLIT_NAMES[split]:
        tars = files.matching(pattern.replace("{split}", name))
        if tars:
            start = os.path.basename(pattern).partition("*")[0]
            shared = start.replace("{split}", name) if "{split}" in start else ""
            root = tree.unwrap(tar_tree.open_tars(tars, shared))
            alone = len(root.contents.folders) == 1 and not root.contents.images
            return (tree.split_folder(root, split) if alone else None) or root
    return None


def _open_tfds(name: str, split: str, data_dir: str | None) -> tuple[TfdsRecords, bool]:
    """A prepared tensorflow-datasets set, read from its ArrayRecord files without TensorFlow."""
    import tensorflow_datasets as tfds

    def refusal(reason: str) -> ValueError:
        return ValueError(
            "a tensorflow-datasets set must be prepared with file_format='array_record'; got "
            f"{name} in {data_dir or 'the default folder'}, which {reason}; prepare it, or name "
            "its folder in data.data_dir"
        )

    try:
        builder = tfds.builder(name, data_dir=_tfds_folder(name, data_dir))
    except Exception as error:  # tensorflow-datasets has no common class for these
        raise refusal(f"is not known ({_first_line(error)})") from error
    info = builder.info
    if not {"image", "label"} <= set(info.features):
        raise ValueError(
            "a tensorflow-datasets set needs the features image and label; got "
            f"{name} with {', '.join(info.features)}; take another set"
        )
    labels = getattr(info.features["label"], "names", None)
    if labels is None:
        raise ValueError(
            "the label of a tensorflow-datasets set must be a class; got "
            f"{type(info.features['label']).__name__} in {name}; take another set, or a folder tree"
        )
    if not info.splits:
        raise refusal("is not prepared")
    own = {key: [n for n in names if n in info.splits] for key, names in SPLIT_NAMES.items()}
    has_splits = all(own.values())
    chosen = own[split][0] if has_splits else next(iter(own["train"] or info.splits))
    try:
        decoders = {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source(split=chosen, decoders=decoders)
    except Exception as error:
        raise refusal(f"cannot be read ({_first_line(error)})") from error
    title = f"{info.full_name}:{chosen}"
    parts = [title, len(source), info.splits[chosen].num_bytes, *labels]
    return TfdsRecords(source, tuple(labels), fingerprint_of(parts), title), has_splits


def _tfds_folder(name: str, data_dir: str | None) -> str | None:
    """The folder of tensorflow-datasets; one in a bucket as a copy of the set alone."""
    if not data_dir or not buckets.is_bucket(data_dir):
        return data_dir
    title = name.partition("/")[0].partition(":")[0]
    return str(snapshots.local(files.path(data_dir) / title).parent)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _open_archive(root: epath.Path, split: str) -> tuple[ArchiveRecords, bool]:
    """An archive whose shards all have the sizes that its manifest states."""
    import grain

    folder, has_splits = _archive_folder(root, split)
    manifest = read_manifest(folder / MANIFEST)
    check_shards(folder, manifest)
    names, unlabelled = tuple(manifest["label_names"]), manifest.get("unlabelled", "")
    training, numbers = names, np.arange(len(names))
    if has_splits and split != "train" and (root / "train" / MANIFEST).exists():
        training = tuple(read_manifest(root / "train" / MANIFEST)["label_names"])
        unknown = sorted(set(names) - set(training))
        if unknown:
            unlabelled = f"{folder} has classes that training has not, the first {unknown[0]}"
        else:
            numbers = np.asarray([training.index(name) for name in names], np.int64)
    paths = [str(path) for path in local_shards(folder, manifest)]
    parts = [(shard["name"], shard["sha256"]) for shard in manifest["shards"]]
    records = ArchiveRecords(
        source=grain.sources.ArrayRecordDataSource(paths),
        label_names=training,
        fingerprint=fingerprint_of(parts),
        title=folder.name,
        unlabelled=unlabelled,
        pixels=manifest.get("pixels", {"crop": manifest.get("crop", "unknown")}),
        numbers=None if unlabelled else numbers,
    )
    return records, has_splits


def _archive_folder(root: epath.Path, split: str) -> tuple[epath.Path, bool]:
    """The folder of a split of an archive and True, or the archive itself and False."""
    try:
        folders = set(files.folders_in(root))
    except OSError as error:
        raise ValueError(
            f"an archive must be readable; got {root} ({error.strerror or error}); check the path"
        ) from error
    if (root / MANIFEST).exists() or not folders & tree.EVERY_SPLIT:
        return root, False
    for name in SPLIT_NAMES[split]:
        if name in folders:
            return root / name, True
    raise ValueError(
        f"an archive with splits needs one of {', '.join(SPLIT_NAMES[split])} for {split}; got "
        f"{root} with {', '.join(sorted(folders))}; convert that split, or name one of these"
    )
