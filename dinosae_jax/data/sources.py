"""Opening an image set by its name: which files it has, their labels, and its splits."""

import glob
import os
import pathlib
import tarfile

import numpy as np

from dinosae_jax.data.manifest import MANIFEST, check_shards, read_manifest
from dinosae_jax.data.records import (
    ArchiveRecords,
    FileRecords,
    Records,
    Subset,
    TfdsRecords,
    fingerprint_of,
)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLIT_NAMES = {"train": ("train",), "eval": ("eval", "val", "validation", "test")}


def open_records(
    source: str, split: str, *, data_dir: str | None = None, holdout: int = 0
) -> Records:
    """Open one split of an image set.

    Args:
        source: 'photos/<side>', 'tfds:<name>', 'folder:<path>', 'tar:<pattern>' or
            'array_record:<path>'.
        split: 'train' or 'eval'. A tensorflow-datasets set answers 'eval' with its split eval,
            val, validation or test; a folder or an archive with its subfolder of such a name; a
            tar pattern with {split} in it has it replaced by such a name.
        data_dir: tensorflow-datasets folder, None for its default.
        holdout: where the set has no splits of its own, every holdout-th image (by sorted name)
            is 'eval' and the others are 'train'. With 0, 'train' is everything and there is no
            'eval'.

    Raises:
        ValueError: the set cannot be found, read, or has no such split or no images.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"A split is 'train' or 'eval'; got {split!r}.")
    records, has_splits = _open(source, split, data_dir)
    if len(records) == 0:
        raise ValueError(
            f"An image source must hold images; {source} ({split}) holds none that end in "
            f"{' '.join(sorted(EXTENSIONS))}: check the path."
        )
    return records if has_splits else _held_out(records, source, split, holdout)


def _open(source: str, split: str, data_dir: str | None) -> tuple[Records, bool]:
    """The records of a split and True, or of a whole set that has no splits and False."""
    kind, _, place = source.partition(":")
    if source.startswith("photos/"):
        from dinosae_jax.data import photos

        data_dir = photos.prepare(data_dir, source.removeprefix("photos/"))
        return _open_tfds(source, split, data_dir)
    if kind == "tfds" and place:
        return _open_tfds(place, split, data_dir)
    if kind == "tar" and place:
        return _open_tar(place, split)
    if kind in ("folder", "array_record") and place:
        folder, has_splits = _split_folder(pathlib.Path(place).expanduser(), split)
        return (_open_folder if kind == "folder" else _open_archive)(folder), has_splits
    raise ValueError(
        "An image source is 'photos/112', 'tfds:NAME', 'folder:PATH', 'tar:PATTERN' or "
        f"'array_record:PATH'; got {source!r}."
    )


def _held_out(records: Records, source: str, split: str, holdout: int) -> Records:
    """The images of a set without splits that the rule of `holdout` gives to `split`."""
    if not holdout:
        if split == "eval":
            raise ValueError(
                f"{source} has no images kept for evaluation: set data.holdout=10 to keep every "
                "tenth image out of training, or make subfolders train and val."
            )
        return records
    if not 2 <= holdout <= len(records):
        raise ValueError(
            f"data.holdout keeps every n-th image out of training, 2 <= n <= {len(records)} here; "
            f"got {holdout}."
        )
    held = np.arange(len(records)) % holdout == 0
    indices = np.flatnonzero(held if split == "eval" else ~held)
    fingerprint = fingerprint_of([records.fingerprint, split, holdout])
    return Subset(records, indices, records.label_names, fingerprint)


def _split_folder(root: pathlib.Path, split: str) -> tuple[pathlib.Path, bool]:
    """The subfolder of a split and True, or the folder itself and False where it has none."""
    try:
        folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    except OSError as error:
        raise ValueError(
            f"An image folder must be readable; got {root} ({error.strerror})."
        ) from error
    if SPLIT_NAMES["train"][0] not in folders:
        return root, False
    for name in SPLIT_NAMES[split]:
        if name in folders:
            return root / name, True
    raise ValueError(
        f"{root} has a folder train but none of {', '.join(SPLIT_NAMES[split])}: add one, or name "
        "the folder train itself as the source."
    )


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _open_folder(root: pathlib.Path) -> FileRecords:
    """Images in the folder itself (one class), or below its subfolders (a class each)."""
    with os.scandir(root) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    flat = [e.path for e in entries if e.is_file() and _is_image(e.name)]
    folders = {e.name: sorted(_images_below(root / e.name)) for e in entries if e.is_dir()}
    classes, inside = list(folders), list(folders.values())
    if flat and any(inside):
        name = next(name for name, images in folders.items() if images)
        raise ValueError(
            f"An image folder holds images or class folders; {root} holds both, "
            f"{os.path.basename(flat[0])} and those in {name}: move one kind elsewhere."
        )
    if flat:
        classes, inside = [root.name], [flat]
    paths = [path for images in inside for path in images]
    labels = [label for label, images in enumerate(inside) for _ in images]
    sizes = [os.path.getsize(path) for path in paths]
    names = [os.path.relpath(path, root) for path in paths]
    return FileRecords(
        names=names,
        files=paths,
        file_of=np.arange(len(paths), dtype=np.int32),
        offsets=np.zeros(len(paths), np.int64),
        sizes=np.asarray(sizes, np.int64),
        labels=np.asarray(labels, np.int32),
        label_names=tuple(classes),
        fingerprint=fingerprint_of([*classes, *zip(names, sizes, strict=True)]),
    )


def _images_below(root: pathlib.Path) -> list[str]:
    found = ((folder, file) for folder, _, files in os.walk(root) for file in files)
    return [os.path.join(folder, file) for folder, file in found if _is_image(file)]


def _open_tar(pattern: str, split: str) -> tuple[FileRecords, bool]:
    """Tar files: the class is an image's folder inside the tar, or else the tar's own name."""
    candidates = [pattern]
    if "{split}" in pattern:
        candidates = [pattern.replace("{split}", name) for name in SPLIT_NAMES[split]]
    expanded = (sorted(glob.glob(os.path.expanduser(each))) for each in candidates)
    tars = next((found for found in expanded if found), [])
    if not tars:
        raise ValueError(f"A tar source must name tar files; nothing matches {candidates[0]}.")
    members = [member for number, path in enumerate(tars) for member in _tar_members(number, path)]
    classes = sorted({member[1] for member in members})
    label_of = {name: label for label, name in enumerate(classes)}
    names = [f"{os.path.basename(tars[number])}/{name}" for number, _, name, _, _ in members]
    sizes = [member[4] for member in members]
    records = FileRecords(
        names=names,
        files=tars,
        file_of=np.asarray([member[0] for member in members], np.int32),
        offsets=np.asarray([member[3] for member in members], np.int64),
        sizes=np.asarray(sizes, np.int64),
        labels=np.asarray([label_of[member[1]] for member in members], np.int32),
        label_names=tuple(classes),
        fingerprint=fingerprint_of([*classes, *zip(names, sizes, strict=True)]),
    )
    return records, "{split}" in pattern


def _tar_members(number: int, path: str) -> list[tuple[int, str, str, int, int]]:
    """(number of the tar, class, name, offset, size) of each image, sorted by name."""
    try:
        with tarfile.open(path, "r:") as tar:
            headers = [member for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"A tar source must be an uncompressed tar file, which alone allows random access; "
            f"{path} is not ({error}): unpack it, or pack it again without compression."
        ) from error
    images = [m for m in headers if _is_image(os.path.basename(m.name))]
    if not images and any(m.name.endswith(".tar") for m in headers):
        raise ValueError(
            f"A tar source must hold images; {path} holds further tar files: unpack it once "
            "(tar -xf) and name those."
        )
    own_name = os.path.basename(path).removesuffix(".tar")
    return [
        (
            number,
            _parent_name(m.name) or own_name,
            m.name,
            m.offset_data,
            m.size,
        )
        for m in sorted(images, key=lambda m: m.name)
    ]


def _parent_name(member: str) -> str:
    """The folder of a tar's member; empty for './1.png', which `tar -C FOLDER .` writes."""
    return os.path.basename(os.path.dirname(os.path.normpath(member)))


def _open_tfds(name: str, split: str, data_dir: str | None) -> tuple[TfdsRecords, bool]:
    """A prepared tensorflow-datasets set, read from its ArrayRecord files without TensorFlow."""
    import tensorflow_datasets as tfds

    refusal = (
        "A tensorflow-datasets set must be prepared with file_format='array_record'; "
        f"{name} in {data_dir or 'the default folder'} "
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # tensorflow-datasets has no common class for these
        raise ValueError(refusal + f"is not known ({_first_line(error)}).") from error
    info = builder.info
    if not {"image", "label"} <= set(info.features):
        raise ValueError(
            f"A tensorflow-datasets set needs the features image and label; {name} has "
            f"{', '.join(info.features)}."
        )
    labels = getattr(info.features["label"], "names", None)
    if labels is None:
        raise ValueError(
            f"The label of a tensorflow-datasets set must be a class; that of {name} is "
            f"{type(info.features['label']).__name__}: take another set, or a folder tree."
        )
    if not info.splits:
        raise ValueError(refusal + "is not prepared.")
    own = {key: [n for n in names if n in info.splits] for key, names in SPLIT_NAMES.items()}
    has_splits = all(own.values())
    chosen = own[split][0] if has_splits else next(iter(own["train"] or info.splits))
    try:
        decoders = {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source(split=chosen, decoders=decoders)
    except Exception as error:
        raise ValueError(refusal + f"cannot be read ({_first_line(error)}).") from error
    title = f"{info.full_name}:{chosen}"
    parts = [title, len(source), info.splits[chosen].num_bytes, *labels]
    return TfdsRecords(source, tuple(labels), fingerprint_of(parts), title), has_splits


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _open_archive(folder: pathlib.Path) -> ArchiveRecords:
    """An archive whose shards all have the sizes that its manifest states."""
    import grain

    manifest = read_manifest(folder / MANIFEST)
    check_shards(folder, manifest)
    paths = [str(folder / shard["name"]) for shard in manifest["shards"]]
    source = grain.sources.ArrayRecordDataSource(paths)
    parts = [(shard["name"], shard["sha256"]) for shard in manifest["shards"]]
    return ArchiveRecords(
        source, tuple(manifest.get("label_names", ())), fingerprint_of(parts), folder.name
    )
