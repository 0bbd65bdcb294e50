"""Finds the state dict in a file: training checkpoints wrap it in containers and prefixes."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion.readers.pth import read_pth
from weights_conversion.readers.safetensors_file import read_safetensors
from weights_conversion.readers.stored import RefusedFileError, StoredTensor, short

PREFERRED = ("ema", "model", "state_dict")
WRAPPERS = ("module.", "_orig_mod.", "ema.", "model.", "state_dict.", "backbone.", "dino_model.")
MAX_KEY_LENGTH = 1000

# sha256 prefixes of published files. torch hub puts them into the file's name.
KNOWN_FILES = {
    "08c60483": "dinov3_vits16 (LVD-1689M)",
    "4057cbaa": "dinov3_vits16plus (LVD-1689M)",
    "73cec8be": "dinov3_vitb16 (LVD-1689M)",
    "8aa4cbdd": "dinov3_vitl16 (LVD-1689M)",
    "eadcf0ff": "dinov3_vitl16 (SAT-493M)",
    "46503df0": "dinov3_vitl16plus (LVD-1689M)",
    "7c1da9a5": "dinov3_vith16plus (LVD-1689M)",
    "a955f4ea": "dinov3_vit7b16 (LVD-1689M)",
    "a6675841": "dinov3_vit7b16 (SAT-493M)",
    "397923af": "vgg16 (torchvision, ImageNet)",
    "6726825d": "FID Inception (2015-12-05)",
}


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The state dict that was chosen.

    Attributes:
      tensors: Key without prefix -> tensor, in the file's order.
      prefix: Containers and wrappers that stood before every key, such as `ema.module.`.
      left: What else the file holds, by its path.
    """

    tensors: dict[str, StoredTensor]
    prefix: str
    left: list[str]


def read(path: str | Path, container: str | None = None) -> StateDict:
    """Opens a checkpoint and picks its state dict.

    Args:
      path: A .safetensors file or a torch zip file.
      container: Path of the container, such as `model`; None takes `ema`, then `model`, then
        `state_dict`, then the file itself.

    Returns:
      The state dict, its tensors not read yet.

    Raises:
      RefusedFileError: The file is damaged, hostile, of another format, or has no such container.
    """
    path = Path(path)
    if not path.is_file():
        raise RefusedFileError(f"there is no file {path}: give a .safetensors or .pth file")
    flat = path.suffix == ".safetensors"
    saved = _nested(read_safetensors(path)[0]) if flat else read_pth(path)
    found = dict(_state_dicts(saved, "", 3, set()))
    name = _choose(path, found, container)
    tensors = {k: v for k, v in found[name].items() if isinstance(v, StoredTensor)}
    _check_keys(path, tensors)
    others = [k for k in found if k != name and not name.startswith(f"{k}.")]
    skipped = {f"{name}.{k}".strip(".") for k in found[name] if k not in tensors}
    left = [f"{k} (state dict)" for k in others] + sorted(skipped - set(others) - {""})
    if name and isinstance(saved, dict):
        top = name.split(".")[0]
        heads = {other.split(".")[0] for other in others}
        left += [short(key) for key in saved if key != top and key not in heads]
    tensors, wrappers = unwrap(tensors)
    return StateDict(tensors, f"{name}." * bool(name) + wrappers, left)


def _nested(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """A flat file whose every key begins with a container's name, as the containers it holds."""
    if not all(key.split(".", 1)[0] in PREFERRED and "." in key for key in tensors):
        return dict(tensors)
    nested: dict[str, Any] = {}
    for key, tensor in tensors.items():
        container, rest = key.split(".", 1)
        nested.setdefault(container, {})[rest] = tensor
    return nested


def _check_keys(path: Path, tensors: Mapping[Any, StoredTensor]) -> None:
    """Keys stand in messages and in conversion.json, so they must be printable lines."""
    for key in tensors:
        if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_KEY_LENGTH:
            raise RefusedFileError(
                f"{short(path.name)} has a tensor named {short(repr(key))}; names are printable "
                f"strings of at most {MAX_KEY_LENGTH} characters: rename it"
            )


def _state_dicts(value: Any, path: str, depth: int, seen: set[int]):
    """Every dictionary that holds tensors, by its dotted path, each once."""
    if not isinstance(value, dict) or not depth or id(value) in seen:
        return
    seen.add(id(value))  # a hostile file may hold one dictionary under thousands of names
    if any(isinstance(item, StoredTensor) for item in value.values()):
        yield path, value
    for key, item in value.items():
        if isinstance(key, str):
            yield from _state_dicts(item, f"{path}.{key}".strip("."), depth - 1, seen)


def _choose(path: Path, found: Mapping[str, Any], container: str | None) -> str:
    if container is not None:
        if container not in found:
            raise RefusedFileError(
                f"{short(path.name)} has no container {container!r}; it has "
                f"{', '.join(repr(short(name)) for name in found) or 'no tensors at all'}"
            )
        return container
    for wanted in PREFERRED:
        for name in found:
            if name.split(".")[0] == wanted:
                return name
    if "" in found or len(found) == 1:
        return "" if "" in found else next(iter(found))
    raise RefusedFileError(
        f"{short(path.name)} has {'several containers' if found else 'no tensors'}"
        f"{': ' if found else ''}{', '.join(map(short, found))}; name one with --container"
    )


def unwrap(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Strips prefixes that all keys share, such as `module.` of distributed training.

    Args:
      tensors: Key -> anything.

    Returns:
      The same without the prefixes, and the prefixes.
    """
    prefix = ""
    stripped = dict(tensors)
    while stripped:
        shared = [w for w in WRAPPERS if all(key.startswith(w) for key in stripped)]
        if not shared:
            break
        prefix += shared[0]
        stripped = {key.removeprefix(shared[0]): value for key, value in stripped.items()}
    return stripped, prefix


def sha256(path: Path) -> str:
    """Hash of a file, checked against the one that its name claims, as in `name-8aa4cbdd.pth`.

    Raises:
      RefusedFileError: The name claims another hash.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    claimed = re.search(r"-([0-9a-f]{8})$", path.stem)
    if claimed and path.suffix != ".safetensors" and not digest.startswith(claimed[1]):
        known = KNOWN_FILES.get(claimed[1])
        whose = f", the hash of {known}" if known else ""
        raise RefusedFileError(
            f"{short(path.name)} claims sha256 {claimed[1]}...{whose}, but its content has "
            f"{digest[:8]}...: the file is damaged or another one; download it again or rename it"
        )
    return digest
