"""Which files the user means: paths as people write them, folders, indices and shards.

A sharded model is an index (`model.safetensors.index.json`, a JSON object whose `weight_map` names
the shard of each key) and files `model-00001-of-00003.safetensors` beside it. The index, the folder
or the shards in any order may be given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from dinosae_jax.runtime import buckets, files, snapshots, untrusted
from weights_conversion.readers import formats
from weights_conversion.readers.stored import RefusedFileError, short

INDEX = ".index.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..+)?")


def user_path(text: str | os.PathLike) -> epath.Path:
    """A path as typed: `~` stands for the home folder, a URL that is no bucket is refused.

    Raises:
      ValueError: The text is empty or a URL.
    """
    if buckets.is_bucket(text):
        return files.path(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(text)):
        raise ValueError(
            f"paths are local files and folders, or in gs:// or s3://; got {text}; copy it here"
        )
    if not str(text):
        raise ValueError("a path names a file or folder; got an empty one; write it after the =")
    try:
        return epath.Path(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(
            f"~NAME is the home folder of a user; got {text}, and there is no such user; write the "
            "path in full"
        ) from None


def split_list(text: str) -> list[str]:
    """Paths joined by commas; where a file or folder with a comma in its name exists, it wins."""
    parts = text.split(",")
    found = []
    while parts:
        lengths = range(len(parts), 0, -1)
        candidates = ((length, ",".join(parts[:length])) for length in lengths)
        length, path = next((c for c in candidates if c[1] and _exists(c[1])), (1, parts[0]))
        found.append(path)
        parts = parts[length:]
    return found


def _exists(text: str) -> bool:
    try:
        return user_path(text).exists()
    except (ValueError, OSError):
        return False


def find_files(given: Iterable[str | os.PathLike]) -> list[Path]:
    """The files behind what was given: files, folders, or indices of shards; in buckets, copies.

    Raises:
      RefusedFileError: Something is missing, is no weights, or leaves its folder.
    """
    here = (Path(snapshots.local(user_path(path))) for path in given)
    found = [file for path in here for file in _files_of(path)]
    _check_complete(found)
    return found


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise RefusedFileError(
            f"--input names a file or folder; got {short(path, 300)}, and there is no file {path}; "
            "give a .safetensors or .pth file, a folder, or the index of shards"
        )
    return _in_index(path) if formats.format_of(path) == formats.JSON else [path]


def _in_folder(folder: Path) -> list[Path]:
    """The weights of a folder, as Hugging Face and training scripts lay them down."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        indices = [n for n in names if n.endswith(tuple(s + INDEX for s in suffixes))]
        weights = [n for n in names if n.lower().endswith(suffixes)]
        if len(indices) == 1:
            return _in_index(folder / indices[0])
        shards = [SHARD.fullmatch(name) for name in weights]
        if len(weights) == 1 or (weights and all(shards) and len({m[1] for m in shards if m}) == 1):
            return [_inside(folder, name) for name in weights]
        if weights or indices:
            raise RefusedFileError(
                f"a folder given as --input holds one model; got {short(folder, 300)} with "
                f"{short(', '.join(indices + weights))}; name one of them"
            )
    raise RefusedFileError(
        f"a folder given as --input holds {', '.join(SUFFIXES)} files or an index of shards; got "
        f"{short(folder, 300)} with {short(', '.join(names[:5])) or 'no files'}; name the file"
    )


def _in_index(index: Path) -> list[Path]:
    """The shards that an index names, each once, in the order of its keys."""
    where = untrusted.read_json(epath.Path(index), "download it again").get("weight_map")
    if not isinstance(where, dict) or not where:
        raise RefusedFileError(
            f"{short(index.name)}: weights are a safetensors or a torch file, or the index of "
            "shards; got JSON without a weight_map; name the file that holds the tensors"
        )
    names = dict.fromkeys(map(str, where.values()))
    shards = [_inside(index.parent, name) for name in names]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise RefusedFileError(
            f"{short(index.name)} needs all {len(shards)} shards beside it; got none called "
            f"{short(', '.join(missing))}; download them too"
        )
    return shards


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; of Hugging Face's cache also its links into the blobs of the same model.

    Raises:
      RefusedFileError: The name leaves the folder, by its spelling or by a link.
    """
    path = folder / name
    cache = folder.resolve().parent
    is_cache = cache.name == "snapshots" and "/" not in name
    if is_cache and path.is_symlink() and path.resolve().parent == cache.parent / "blobs":
        return path
    try:
        return Path(untrusted.inside(epath.Path(folder), name, "give the file itself as --input"))
    except ValueError as error:
        raise RefusedFileError(str(error)) from None


def _check_complete(files: Sequence[Path]) -> None:
    """Refuses a part of a sharded model."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in files:
        match = SHARD.fullmatch(path.name)
        if match:
            sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), numbers in sets.items():
        if len(numbers) < count:
            raise RefusedFileError(
                f"a sharded model needs all of its {count} shards; got {len(numbers)} of "
                f"{short(name)}; give the folder, its {INDEX[1:]}, or all shards joined by commas"
            )
