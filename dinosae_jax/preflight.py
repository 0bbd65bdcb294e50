"""What a job needs and does not find, told at once, as commands that lead to a running job.

Looks at every path that a config names (weights, `init_from`, images, latents) without opening
anything: does it exist, and is it of the right kind? Where the run that `init_from` names does not
exist but is one that a config file makes by default, that config is followed back to the first
stage. The jobs still check what they open; this check is there to be early and complete.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Iterable, Sequence

import ml_collections
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax import config_files, encoders, names
from dinosae_jax.runtime import files

SOURCES = ("tfds", "folder", "tar", "array_record")
PROGRAM = "python -m dinosae_jax.main"
SETTLED = frozenset({"stem", "decoder", *names.CONVERSIONS})  # what an unknown kind may hold
IMAGENET = "tfds:imagenet2012"  # the default of every config
IMAGENET_ARCHIVE = "data/imagenet"
IMAGENET_COMMAND = (
    "--config=configs/convert_images.py "
    f"--workdir={IMAGENET_ARCHIVE} --config.source='tar:DIR/ILSVRC2012_img_{{split}}.tar' "
    "--config.eval_synsets=LIST"
)
IMAGENET_HINT = (
    "DIR holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; LIST is "
    "datasets/imagenet2012/validation_labels.txt of the installed tensorflow_datasets "
    "(docs/imagenet.md has smaller archives and other ways)"
)


class Missing(ValueError):
    """A heading that names what is missing, then the numbered commands, one per line."""


def check(config: ml_collections.ConfigDict, workdir: epath.Path, argv: Sequence[str]) -> None:
    """Raises Missing where something that the job needs is not there.

    Args:
      config: of any job, valid; a chain's stages are checked one by one.
      workdir: of the run; a finished run needs nothing.
      argv: the command line as it was given, which the last command repeats.
    """
    program = "dinosae" if os.path.basename(argv[0]) == "dinosae" else PROGRAM
    survey = Survey(program)
    if (workdir / "DONE").exists():
        return
    flags: dict[str, str] = {}
    if config.job in ("bench", "card", "plan", "paper", "ablation", "convert_images"):
        return  # these train nothing by name, or make what they start from
    if "chain" in config:
        for name in config.chain:
            stage = config.stages[name]
            own = survey.needs(stage, tuple(config.chain))
            flags |= {f"config.stages.{name}.{field}": value for field, value in own.items()}
    else:
        own = survey.needs(config)
        flags |= {f"config.{field}": value for field, value in own.items()}
    if survey.missing:
        raise Missing(survey.text(_command(program, argv, flags)))


class Survey:
    """What was looked for: what is missing, and the commands that make it."""

    def __init__(self, program: str):
        """Starts with nothing missing."""
        self.program = program
        self.missing: list[str] = []
        self._conversions: dict[str, str] = {}
        self._data: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def needs(
        self, config: ml_collections.ConfigDict, chain: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Looks for everything that one config names.

        Args:
          config: of one stage or job.
          chain: stages of its chain, whose names may stand in `init_from` and `data.latents`.

        Returns:
          field -> value of the flags that the command lacks.
        """
        found = SETTLED if config.get("init_from") in chain else self._start(config)
        for field in ("weaker", "encoder", "autoencoder"):
            self._start(config, field)
        flags = self._weights(config, found)
        for field in ("samples", "reference"):
            self._file(field, config.get(field, ""))
        if "images" in config and config.job == "reconstruct":
            flags |= self._images("images", config.images, config.data_dir)
        elif "data" in config:
            flags |= self._data_set(config, chain)
        return flags

    def text(self, command: str) -> str:
        """The heading and the numbered commands, of which `command` is the last."""
        commands = (*self._conversions.values(), *self._data.values(), *self._runs.values())
        said = ", ".join(dict.fromkeys(self.missing))  # stages of a chain may lack the same
        lines = [f"missing: {said.removesuffix('?')}. From here to a running job:"]
        lines += [f"  {number}. {line}" for number, line in enumerate((*commands, command), 1)]
        return "\n".join(lines)

    def _weights(self, config: ml_collections.ConfigDict, found: Iterable[str]) -> dict[str, str]:
        """Looks for converted networks; returns the flags `weights.ROLE` that the command lacks."""
        flags = {}
        given = config.get("weights", {})
        needed = [role for role in config_lib.frozen_networks(config) if role not in found]
        for role in dict.fromkeys((*needed, *(role for role in given if given[role]))):
            path, conversion = given[role], encoders.conversion(role, config.get("model", {}))
            if not path and role in config.random_frozen_ok:
                continue
            if path and holds(path, role):
                continue
            self.missing.append(
                f"{conversion.network} (weights.{role}"
                + (f"={path}, which {_why_not(path)})" if path else " is empty)")
            )
            target, source = path or conversion.folder, ""
            if path and files.path(path).exists():  # a file as it was published, or another kind
                source = path if files.path(path).is_file() else ""
                target = conversion.folder
            if target != path:
                flags[f"weights.{role}"] = target
            if not holds(target, role):
                self._conversions[role] = conversion.command(source, target)
        return flags

    def _start(self, config: ml_collections.ConfigDict, field: str = "init_from") -> Iterable[str]:
        """Looks for the run that a field names; returns the roles that it brings along."""
        path = config.get(field, "")
        if not path or (field == "init_from" and config.get("samples")):
            return ()
        folder = files.path(path)
        unfinished = config.job in ("train", "encode") and _is_unfinished(folder)
        if folder.exists() and not unfinished:
            return roles_of(folder)
        self.missing.append(f"{path} ({field}{', not finished' if unfinished else ''})")
        made = config_files.made_by(path)
        before = config_files.load(*made) if made else None
        if made is None or before is None or before.job != "train" or "chain" in before:
            self.missing[-1] += _near(folder)
            self._runs[path] = (
                f"the command that began {path}, once more"
                if unfinished
                else f"name a workdir, checkpoint, export or conversion with --config.{field}=..."
            ) + _newest_checkpoint(folder)
            return SETTLED
        given = {}
        for name in ("source", "data_dir") if "data" in config else ():  # the same images
            if before.data[name] != config.data[name]:
                given[f"data.{name}"] = before.data[name] = config.data[name]
        seen = len(self.missing)
        found = self._start(before)
        flags = self._weights(before, found)
        given |= self._data_set(before)
        del self.missing[seen:]  # what the earlier stages lack stands among the commands
        command = _command_for(self.program, path, made, flags | given)
        self._runs[path] = command + _newest_checkpoint(folder)
        return {*found, *config_lib.frozen_networks(before)}

    def _file(self, field: str, path: str) -> None:
        """Looks for a file that only the user can name."""
        if path and not files.path(path).exists():
            self.missing.append(f"{path} ({field}){_near(files.path(path))}")
            self._data[path] = f"name another file with --config.{field}=..."

    def _data_set(
        self, config: ml_collections.ConfigDict, chain: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Looks for the images or latents that a job reads; returns the flags that it lacks."""
        data = config.data
        if config.get("samples") and config.get("reference"):
            return {}
        flags = self._images("data.source", data.source, data.data_dir)
        latents = data.get("latents", "")
        if latents in chain:
            return flags
        if latents and not (files.path(latents) / "train" / "manifest.json").is_file():
            self.missing.append(f"latents (data.latents={latents})")
            self._runs[latents] = (
                f"{self.program} --config=configs/encode.py --workdir={shlex.quote(latents)} "
                f"--config.init_from={shlex.quote(config.init_from)}"
                + "".join(f" --config.{name}={value}" for name, value in flags.items())
            )
        return flags

    def _images(self, field: str, source: str, data_dir: str) -> dict[str, str]:
        """Looks for a source of images, or a folder of them; returns the flag that is lacking."""
        kind, _, place = source.partition(":")
        if kind not in SOURCES and field == "images" and not source.startswith("photos/"):
            kind, place = "folder", source
        folder = _tfds_folder(place, data_dir) if kind == "tfds" else files.path(place)
        if _has_images(kind, folder):
            return {}
        close = difflib.get_close_matches(place, ["imagenet2012"]) if kind == "tfds" else []
        misspelt = bool(close) and close[0] != place
        near = f", did you mean tfds:{close[0]}?" if misspelt else _near(folder)
        self.missing.append(f"images ({field}={source}){near}")
        if source != IMAGENET:
            right = close[0] if misspelt else place
            self._data[source] = _data_command(self.program, field, kind, right)
            return {field: f"tfds:{right}"} if misspelt else {}
        if not _has_images("array_record", files.path(IMAGENET_ARCHIVE)):
            self._data[source] = f"{self.program} {IMAGENET_COMMAND}\n     # {IMAGENET_HINT}"
        return {field: f"array_record:{IMAGENET_ARCHIVE}"}


def holds(path: str, role: str) -> bool:
    """Whether a folder holds converted weights of a role."""
    record = _json(files.path(path) / "conversion.json")
    return role in record.get("config", {})


def roles_of(path: epath.Path) -> Iterable[str]:
    """The roles that an existing `init_from` brings along; all where that cannot be seen."""
    for file, field in (("export.json", "roles"), ("conversion.json", "config")):
        if (path / file).is_file():
            return _json(path / file).get(field, SETTLED)
    workdir = path.parent.parent if path.name.isdigit() else path
    frozen = [name for name in files.names_in(workdir / "frozen") if name.endswith(".safetensors")]
    return {"stem", "decoder", *(name.rpartition("-")[0] for name in frozen)}


def _command_for(program: str, path: str, made: tuple[str, str], flags: dict[str, str]) -> str:
    """The command that makes the run of a folder, from its config name and variants."""
    value = ":".join(filter(None, (f"configs/{made[0]}.py", made[1])))
    words = [program, f"--config={value}"]
    if path != config_files.default_workdir(value):
        words.append(f"--workdir={shlex.quote(path)}")
    return " ".join((*words, *(f"--config.{name}={shlex.quote(flags[name])}" for name in flags)))


def _near(folder: epath.Path) -> str:
    """A phrase that names the neighbour of a missing path whose name is nearest."""
    close = difflib.get_close_matches(folder.name, files.names_in(folder.parent), n=1)
    return f", did you mean {folder.parent / close[0]}?" if close else ""


def _newest_checkpoint(folder: epath.Path) -> str:
    """How an unfinished run can be used as it is; empty where it has no checkpoint."""
    steps = [name for name in files.names_in(folder / "checkpoints") if name.isdigit()]
    newest = f"{folder}/checkpoints/{max(steps, key=int)}" if steps else ""
    return f"   # or start from what it has: --config.init_from={newest}" if newest else ""


def _is_unfinished(path: epath.Path) -> bool:
    """Whether a folder is the workdir of one run that has not reached its end."""
    return (path / "config.json").is_file() and not (path / "DONE").exists()


def _why_not(path: str) -> str:
    place = files.path(path)
    if not place.exists():
        return "does not exist"
    kind = _json(place / "conversion.json").get("kind")
    if kind:
        return f"holds another network, of kind {kind}"
    return "is no folder of converted weights"


def _tfds_folder(name: str, data_dir: str) -> epath.Path:
    """Where tensorflow-datasets keeps a set: 'name', 'name/config' or 'name:version'."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return files.path(root) / name.partition("/")[0].partition(":")[0]


def _has_images(kind: str, folder: epath.Path) -> bool:
    """Whether a source of images is there; True for what only the job can tell."""
    if kind == "tar":
        return bool(files.matching(str(folder).replace("{split}", "*")))
    if kind == "array_record":
        return any((folder / each / "manifest.json").is_file() for each in ("", "train"))
    return kind not in ("folder", "tfds") or folder.is_dir()


def _data_command(program: str, field: str, kind: str, place: str) -> str:
    if kind == "tfds":
        return f"pip install tensorflow && tfds build {place} --file_format=array_record"
    if kind == "array_record":
        return (
            f"{program} --config=configs/convert_images.py --workdir={shlex.quote(place)} "
            "--config.source=folder:PATH"
        )
    return f"name images with --config.{field}=folder:PATH, tar:PATTERN, tfds:NAME or photos/112"


def _command(program: str, argv: Sequence[str], flags: dict[str, str]) -> str:
    """The command as it was given, with flags that replace their earlier values."""
    names_given = {f"--{name}" for name in flags}
    kept = [each for each in argv[1:] if each.partition("=")[0] not in names_given]
    added = [f"--{name}={value}" for name, value in flags.items()]
    return " ".join((program, *(shlex.quote(each) for each in (*kept, *added))))


def _json(path: epath.Path) -> dict:
    """A JSON object; empty where there is none, for the job to say what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
