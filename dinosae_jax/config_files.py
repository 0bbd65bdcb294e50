"""Config files by name: those of a folder `configs` here, and those of the installed package.

Config files import one another as `from configs import sae_stage1`. `open_package` makes that name
mean the folder of the file that was asked for, then the package's own config files, so that a
config works from every folder and a person's own config can start from one of ours.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import types
from collections.abc import Iterable

import ml_collections

from dinosae_jax import rules, spelling

PACKAGE = "configs"
RUNS = "runs"


def packaged() -> pathlib.Path:
    """The folder of the config files that came with the package, or of the checkout."""
    package = pathlib.Path(__file__).parent
    shared = package / "share" / PACKAGE
    return shared if shared.is_dir() else package.parent / PACKAGE


def find(name: str) -> pathlib.Path:
    """The config file of a `--config`, without its variants.

    Args:
      name: a path; `configs/X.py` is also looked for among the files of the package.

    Raises:
      ValueError: where there is no such file.
    """
    rules.require_local("--config", name)
    here = pathlib.Path(name).expanduser()
    if here.is_file():
        return here
    if here.parent == pathlib.Path(PACKAGE) and (packaged() / here.name).is_file():
        return packaged() / here.name
    known = {f"{PACKAGE}/{name}.py" for name in _names((pathlib.Path(PACKAGE), packaged()))}
    raise ValueError(f"--config names a config file; got {name!r}{spelling.nearest(name, known)}")


def open_package(file: pathlib.Path) -> None:
    """Makes `from configs import ...` find the neighbours of a config file, then the package's."""
    own = [file.parent] if file.parent.name == PACKAGE else []
    folders = list(dict.fromkeys(str(folder.resolve()) for folder in (*own, packaged())))
    package = types.ModuleType(PACKAGE, "Config files.")
    package.__path__ = folders
    sys.modules[PACKAGE] = package


def load(name: str, argument: str | None = None) -> ml_collections.ConfigDict | None:
    """The config of `configs/NAME.py`; None where there is none, or no such variant."""
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        return module.get_config(argument)
    except (AttributeError, ImportError, ValueError):
        return None


def default_workdir(value: str) -> str:
    """The folder of a run without `--workdir`: 'configs/X.py:a,b' -> 'runs/X_a_b'."""
    file, _, argument = value.partition(":")
    variants = [name for name in argument.split(",") if name]
    return "/".join((RUNS, "_".join((pathlib.Path(file).stem, *variants))))


def made_by(folder: str) -> tuple[str, str] | None:
    """The config name and variants whose runs go to a folder of such a name; None for others.

    The inverse of `default_workdir`: 'runs/sae_stage1_tiny' -> ('sae_stage1', 'tiny').
    """
    wanted = pathlib.Path(folder).name
    for name in sorted(config_names(), key=len, reverse=True):
        if wanted == name or wanted.startswith(f"{name}_"):
            argument = wanted.removeprefix(name).lstrip("_").replace("_", ",")
            return (name, argument) if load(name, argument) else None
    return None


def config_names() -> list[str]:
    """Names of the config files that `configs` holds now."""
    paths = getattr(importlib.import_module(PACKAGE), "__path__", ())
    return sorted(_names(pathlib.Path(path) for path in paths))


def _names(folders: Iterable[pathlib.Path]) -> set[str]:
    """Names of the files in these folders that define a config."""
    files = (path for folder in folders for path in folder.glob("*.py"))
    return {path.stem for path in files if "def get_config(" in path.read_text()}
