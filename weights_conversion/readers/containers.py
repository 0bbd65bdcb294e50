"""Finds the state dict in a file: training checkpoints wrap it in containers and prefixes.

A tensor's stored name has up to four parts: `teacher.module.backbone.blocks.0._orig_mod.norm1.bias`
is the key `blocks.0.norm1.bias` of the network, below the prefix `backbone.`, in the container
`teacher`, with words that torch inserts when it wraps modules. The key is what the tables know; the
stored name is kept, so that the file can be written back.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinosae_jax.runtime.files import file_sha256
from weights_conversion.readers import formats
from weights_conversion.readers.pth import read_pth
from weights_conversion.readers.safetensors_file import read_safetensors
from weights_conversion.readers.stored import RefusedFileError, StoredTensor, short
from weights_conversion.tables import roots

PREFERRED = ("ema", "model", "state_dict")
WRAPPERS = ("ema.", "model.", "state_dict.", "backbone.", "dino_model.")
# Parts of a key that torch inserts (distributed training, torch.compile, activation checkpointing,
# FSDP, Lightning's Fabric) and that are never part of a network's own names.
INSERTED = frozenset(
    {
        "module",
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_forward_module",
    }
)
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
    """What one file gives to a network.

    Attributes:
      path: The file.
      tensors: Key -> tensor, in the file's order.
      prefix: What stands before the keys in the file, such as `ema.module.`.
      renamed: Key -> its whole name in the file, where that is not the prefix and the key.
      left: What else the file holds.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    prefix: str
    renamed: dict[str, str]
    left: list[str]


@dataclasses.dataclass(frozen=True)
class _Container:
    """The chosen container of a file: tensors by name without inserted words, and their names."""

    path: Path
    tensors: dict[str, StoredTensor]
    stored: dict[str, str]
    left: list[str]


def read(
    paths: Sequence[Path], kind: str | None = None, container: str | None = None
) -> list[StateDict]:
    """Opens the files of one network and picks its tensors.

    Args:
      paths: Files, or the shards of one in any order.
      kind: A key of `tables.KINDS`, by whose names the network is found beside others; None takes
        what all keys share as the prefix.
      container: Where the network is, such as `model` or `teacher.backbone`; None takes the
        container that holds one, of several `ema`, then `model`, then `state_dict`.

    Returns:
      One state dict per file, its tensors not read yet.

    Raises:
      RefusedFileError: A file is damaged, hostile, of another format, or has no such container.
    """
    opened = [_open(path, kind, container) for path in paths]
    if kind in roots.PARTS:
        return [_below(file, _prefix([file], kind)) for file in opened]
    prefix = _prefix(opened, kind)
    return [_below(file, prefix) for file in opened]


def strip(tensors: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The tensors of a network, under the keys that the tables know.

    Args:
      tensors: Stored name -> anything.
      kind: A key of `tables.KINDS`.

    Raises:
      RefusedFileError: Two names are one key, or there are several such networks.
    """
    clean = _clean(tensors, "the state dict")
    prefix = _common_prefix(list(clean), kind, "the state dict")
    return {
        key.removeprefix(prefix): tensors[name]
        for key, name in clean.items()
        if key.startswith(prefix)
    }


def _open(path: Path, kind: str | None, container: str | None) -> _Container:
    """Reads a file's index and chooses the container."""
    is_torch = formats.format_of(path) == formats.TORCH
    saved = read_pth(path) if is_torch else read_safetensors(path)[0]
    found = dict(_state_dicts(saved, "", 3, set()))
    name, below = _choose(path, found, kind, container)
    inside = found[name]
    tensors = {key: value for key, value in inside.items() if isinstance(value, StoredTensor)}
    _check_keys(path, tensors)
    others = [k for k in found if k != name and not name.startswith(f"{k}.")]
    skipped = {f"{name}.{k}".strip(".") for k in inside if k not in tensors}
    left = [f"{k} (state dict)" for k in others] + sorted(skipped - set(others) - {""})
    if name and isinstance(saved, dict):
        top = name.split(".")[0]
        heads = {other.split(".")[0] for other in others}
        left += [short(key) for key in saved if key != top and key not in heads]
    lead = f"{name}." if name else ""
    clean = _clean(tensors, short(path.name))
    if below:
        left += _summary(key for key in clean if not key.startswith(below))
    taken = {k.removeprefix(below): own for k, own in clean.items() if k.startswith(below)}
    return _Container(
        path,
        {key: tensors[own] for key, own in taken.items()},
        {key: lead + own for key, own in taken.items()},
        left,
    )


def _key(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def _clean(names: Iterable[str], where: str) -> dict[str, str]:
    """Key without the words that torch inserts -> the name that has them."""
    clean: dict[str, str] = {}
    for name in names:
        key = _key(name)
        if key in clean:
            raise RefusedFileError(
                f"{where}: each tensor has its own name; got {short(clean[key])} and "
                f"{short(name)}, which differ by a word that torch inserts; remove one of them"
            )
        clean[key] = name
    return clean


def _check_keys(path: Path, tensors: Mapping[Any, StoredTensor]) -> None:
    """Keys stand in messages and in conversion.json, so they must be printable lines."""
    for key in tensors:
        if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_KEY_LENGTH:
            raise RefusedFileError(
                f"{short(path.name)}: names of tensors are printable strings of at most "
                f"{MAX_KEY_LENGTH} characters; got a tensor named {short(repr(key))}; rename it"
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


def _choose(
    path: Path, found: Mapping[str, Any], kind: str | None, container: str | None
) -> tuple[str, str]:
    """The name of a container, and the prefix inside it that was asked for by name, or ''."""
    if container is not None:
        return _named(path, found, container)
    fitting = [name for name in found if kind is not None and _holds(kind, found[name])]
    names = _preferred(fitting or list(found), bool(fitting))
    if len(names) == 1:
        return names[0], ""
    raise RefusedFileError(
        f"{short(path.name)}: a file holds one network; got "
        f"{f'several containers, {_list(names)}' if names else 'no tensors'}; "
        f"{'name one with --container' if names else 'give another file'}"
    )


def _preferred(names: list[str], surely: bool) -> list[str]:
    """The names of the best container; where they are no sure fit, the first of several there."""
    tops = [name.split(".")[0] for name in names]
    wanted = next((word for word in (*PREFERRED, "") if word in tops), None)
    if wanted is None:
        return names
    best = [name for name, top in zip(names, tops, strict=True) if top == wanted]
    return best if surely else best[:1]


def _named(path: Path, found: Mapping[str, Any], container: str) -> tuple[str, str]:
    """The container that the user named: a dictionary, or a prefix of keys in one."""
    if container in found:
        return container, ""
    for name, inside in found.items():
        below = f"{container}.".removeprefix(f"{name}." if name else "")
        if any(isinstance(key, str) and _key(key).startswith(below) for key in inside):
            return name, below
    listed = _list([repr(name) for name in found]) or "no tensors at all"
    raise RefusedFileError(
        f"{short(path.name)}: --container names a part of the file; got no container "
        f"{container!r}, it has {listed}; name one of these"
    )


def _holds(kind: str, inside: Mapping[Any, Any]) -> bool:
    tensors = (key for key, value in inside.items() if isinstance(value, StoredTensor))
    return bool(roots.prefixes(kind, (_key(str(key)) for key in tensors)))


def _prefix(files: Sequence[_Container], kind: str | None) -> str:
    """The prefix of the network that the files hold together."""
    names = [key for file in files for key in file.tensors]
    return _common_prefix(names, kind, ", ".join(short(file.path.name) for file in files[:3]))


def _common_prefix(keys: list[str], kind: str | None, where: str) -> str:
    found = roots.prefixes(kind, keys) if kind is not None else []
    if not found:
        return _shared(keys)
    if "" in found:
        return ""
    found = _preferred(found, surely=True)
    if len(found) > 1:
        raise RefusedFileError(
            f"{where}: a file holds one network of this kind; got several, below {_list(found)}; "
            f"name one with --container, as in --container={short(found[0].rstrip('.'))}"
        )
    return found[0]


def _shared(keys: Sequence[str]) -> str:
    """The words of `WRAPPERS` that stand before all keys."""
    prefix = ""
    while keys:
        shared = [w for w in WRAPPERS if all(key.startswith(prefix + w) for key in keys)]
        if not shared:
            break
        prefix += shared[0]
    return prefix


def _below(file: _Container, prefix: str) -> StateDict:
    """The part of a container that lies below a prefix, under the network's own keys."""
    taken = {k.removeprefix(prefix): k for k in file.tensors if k.startswith(prefix)}
    leads = collections.Counter(
        file.stored[name].removesuffix(key)
        for key, name in taken.items()
        if file.stored[name].endswith(key)
    )
    lead = leads.most_common(1)[0][0] if leads else prefix
    stored = {key: file.stored[name] for key, name in taken.items()}
    return StateDict(
        file.path,
        {key: file.tensors[name] for key, name in taken.items()},
        lead,
        {key: name for key, name in stored.items() if name != lead + key},
        file.left + _summary(k for k in file.tensors if not k.startswith(prefix)),
    )


def _summary(keys: Iterable[str]) -> list[str]:
    """Keys that are left, by their first part: `dino_head.* (9 tensors)`."""
    counts = collections.Counter(key.split(".")[0] for key in keys)
    return [f"{short(name)}.* ({count} tensors)" for name, count in counts.items()]


def _list(names: Sequence[str]) -> str:
    listed = ", ".join(short(name.rstrip(".")) for name in names[:6])
    return f"{listed}, ..." if len(names) > 6 else listed


def sha256(path: Path) -> str:
    """Hash of a file, checked against the one that its name claims, as in `name-8aa4cbdd.pth`.

    Eight digits are a date or a step as well as a hash: they claim something only where they are
    the hash of a published file. Other formats than torch's keep the name of the file that they
    were made from.

    Raises:
      RefusedFileError: The name claims another hash.
    """
    digest = file_sha256(path)
    match = re.search(r"-([0-9a-f]{8})$", path.stem)
    claimed = match[1] if match else ""
    known = KNOWN_FILES.get(claimed)
    if not claimed or digest.startswith(claimed) or (claimed.isdigit() and not known):
        return digest
    if formats.format_of(path) != formats.TORCH:
        return digest
    whose = f", the hash of {known}" if known else ""
    raise RefusedFileError(
        f"{short(path.name)}: a name that ends in a hash must have the file's own; got a name that "
        f"claims sha256 {claimed}...{whose}, and content of {digest[:8]}...; the file is damaged "
        "or another one, download it again or rename it"
    )
