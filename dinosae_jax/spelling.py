"""What a misspelt, misplaced or foreign name of a field most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import ml_collections


def printable(text: str) -> str:
    """A text that a stranger may have written, for one line: `?` stands for what has no print."""
    return "".join(c if c.isprintable() else "?" for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A closing phrase for error messages: the nearest known name and the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.45)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known) or 'none'}"


# What people call a field elsewhere.
SYNONYMS = {
    "batch": "batch_size",
    "bs": "batch_size",
    "cfg": "sampling.guidance",
    "cfg_scale": "sampling.guidance",
    "checkpoint_path": "init_from",
    "ckpt": "init_from",
    "data_path": "data.source",
    "dataset": "data.source",
    "ema_decay": "ema",
    "epochs": "steps",
    "guidance_scale": "sampling.guidance",
    "log_interval": "log_every",
    "lr": "optimizer.learning_rate",
    "max_steps": "steps",
    "num_steps": "steps",
    "num_workers": "data.workers",
    "resume": "init_from",
    "train_steps": "steps",
    "wd": "optimizer.weight_decay",
}
WORKDIR_SYNONYMS = ("log_dir", "logdir", "out", "outdir", "output", "output_dir", "save_dir")


def nearest_key(config: ml_collections.ConfigDict, name: str) -> str:
    """A closing phrase for a key that the config lacks: the field that was most likely meant.

    Args:
      config: the whole tree.
      name: the dotted name as given, without `config.`.
    """
    siblings = config
    for part in name.split("."):
        if part not in siblings or not isinstance(siblings[part], ml_collections.ConfigDict):
            break
        siblings = siblings[part]
    beside = difflib.get_close_matches(part, siblings, n=1, cutoff=0.65)
    flag = None if beside else nearest_flag(config, name)
    return f"; did you mean {flag}?" if flag else nearest(part, siblings)


def nearest_flag(config: ml_collections.ConfigDict, name: str) -> str | None:
    """The flag anywhere in a config that a misplaced, misspelt or foreign name most likely means.

    Args:
      config: the whole tree.
      name: a dotted name, without `config.`.

    Returns:
      Such as "--config.batch_size"; on a chain the first stage's, and which others have it. None
      where nothing is near.
    """
    last = name.rpartition(".")[2].replace("-", "_")
    if last in WORKDIR_SYNONYMS:
        return "--workdir"
    wanted = SYNONYMS.get(last, last)
    chain = list(config.get("chain", ()))
    known = sorted(_keys(config), key=lambda key: _place(key, chain))
    near = [key for key in known if f".{key}".endswith(f".{wanted}")]
    if not near:
        ends = {key.rpartition(".")[2] for key in known}
        close = difflib.get_close_matches(last, ends, n=1, cutoff=0.65)
        near = [key for key in known if key.rpartition(".")[2] in close]
    if not near:
        return None
    meant = name.removesuffix(last) + wanted

    def likeness(key: str) -> float:
        compared = key if name.startswith("stages.") else _in_stage(key)
        return difflib.SequenceMatcher(None, meant, compared).ratio()

    best = max(near, key=likeness)
    others = [k.split(".")[1] for k in near if k != best and _in_stage(k) == _in_stage(best)]
    also = f" (also of {', '.join(others)})" if others and not name.startswith("stages.") else ""
    return f"--config.{best}{also}"


def _keys(config: ml_collections.ConfigDict, seen: str = "") -> list[str]:
    """Dotted names of all fields and groups; a random model is no place for a hint."""
    found = []
    for name in config:
        if name in ("random_model", "random_flow"):
            continue
        found.append(f"{seen}{name}")
        if isinstance(config[name], ml_collections.ConfigDict):
            found += _keys(config[name], f"{seen}{name}.")
    return found


def _place(key: str, chain: list[str]) -> int:
    """Where a key comes in a list of hints: the stages of a chain in their order."""
    stage = key.split(".")[1] if key.count(".") > 1 else ""
    return chain.index(stage) if stage in chain else -1


def _in_stage(key: str) -> str:
    """The name of a key within its stage."""
    return key.split(".", 2)[2] if key.startswith("stages.") and key.count(".") > 1 else key
