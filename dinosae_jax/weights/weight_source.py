"""Where the weights of a stage come from, decided before anything is compiled.

For each role, in this order: `init_from` (the moving averages of another run), `weights.<role>`
(a converted file), a random initialisation. A role that is frozen may be random only where
`random_frozen_ok` names it; otherwise the run stops with the command that makes the weights.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from dinosae_jax import config as config_lib
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import files
from dinosae_jax.weights import checkpoint, conversion, role_files

Tree = Any
Variables = dict[str, dict[str, Tree]]
FROZEN_FOLDER = "frozen"
EXPORT_FILE = "export.json"
DONE = "DONE"  # in a stage's workdir: its last step, once it is saved
# Fields of the model config that change how it is computed, not what.
COMPUTE_FIELDS = ("scan_layers", "remat")
CONVERSION_COMMANDS = {
    "vit": "python -m weights_conversion.convert --kind=dinov3 "
    "--input=dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth --output=weights/dinov3",
    "lpips": "python -m weights_conversion.convert --kind=lpips_vgg16 "
    "--input=vgg16-397923af.pth,vgg.pth --output=weights/lpips",
    "dino": "python -m weights_conversion.convert --kind=dino_discriminator "
    "--input=dino_deitsmall8_pretrain.pth --output=weights/dino",
}
NETWORKS = {
    "stem": "stem",
    "vit": "DINOv3 ViT",
    "decoder": "decoder",
    "lpips": "LPIPS VGG16",
    "dino": "DINO discriminator backbone",
}


class WeightSource(NamedTuple):
    """What another run, checkpoint or export offers.

    Attributes:
      variables: role -> {'params': ..., other collections}; moving averages where they exist.
      model: its model config, plain.
      convention: its latent convention, plain; empty for converted weights.
      notes: sentences that travel with the weights.
      path: for messages.
      flow: how a flow was trained and is to be sampled, plain (`inference.generator.flow_record`);
        empty for an autoencoder.
      sha256: of the record that was read, which has checksums of the weights.
    """

    variables: Variables
    model: dict[str, Any]
    convention: dict[str, Any]
    notes: list[str]
    path: pathlib.Path
    flow: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    sha256: str = ""


def open_weights(path: str | pathlib.Path) -> WeightSource:
    """Reads a workdir (its newest checkpoint), one checkpoint, or an export.

    Raises:
      ValueError: where nothing of the kind is there, or a file is damaged.
    """
    folder = pathlib.Path(path).expanduser()
    if (folder / EXPORT_FILE).exists():
        return _open_export(folder)
    if conversion.is_conversion(folder):
        converted = conversion.load(folder)
        names = ", ".join(file["name"] for file in converted.metadata["files"])
        note = f"Starts from converted weights: {names}."
        sha256 = files.file_sha256(folder / conversion.METADATA_FILE)
        return WeightSource(
            converted.variables, converted.config, {}, [note], folder, sha256=sha256
        )
    step = folder if _is_checkpoint(folder) else checkpoint.newest(folder)
    if step is None:
        raise ValueError(
            "weights come from a stage's workdir, a checkpoint, an export or a conversion; got "
            f"{str(path)!r}, which {_why_not(folder)}"
        )
    # The discriminator's heads have no moving average; they are carried on as they are.
    tree, record = checkpoint.load_fields(step, ("ema", "extra", "params/disc_heads"))
    extra = tree.get("extra", {})
    params = {**tree["ema"], **tree.get("params", {})}
    variables: Variables = {
        role: {"params": params[role], **extra.get(role, {})} for role in params
    }
    frozen = step.parent.parent / FROZEN_FOLDER
    for role, file in record["frozen"].items():
        variables.setdefault(role, role_files.read(frozen, role_files.RoleFile(*file)))
    return WeightSource(
        variables,
        record["config"]["model"],
        record["convention"],
        record["notes"],
        step,
        record.get("flow", {}),
        checkpoint.digest(record),
    )


def is_folder_of_weights(folder: pathlib.Path) -> bool:
    """Whether a folder is one checkpoint, an export or a conversion, so that nothing is chosen."""
    exported = (folder / EXPORT_FILE).exists()
    return exported or conversion.is_conversion(folder) or _is_checkpoint(folder)


def identity(source: WeightSource) -> dict[str, Any]:
    """Which weights these are, for records: path, step (None where there is none), sha256."""
    step = int(source.path.name) if _is_checkpoint(source.path) else None
    return {"path": str(source.path), "step": step, "sha256": source.sha256}


def _is_checkpoint(folder: pathlib.Path) -> bool:
    return folder.name.isdigit() and (folder / "state").exists()


def export(source: WeightSource, output: pathlib.Path, wanted: tuple[str, ...]) -> None:
    """Writes roles as one self-contained folder that `open_source` reads.

    Raises:
      ValueError: where the folder already holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"an export needs an empty folder; got {output}; name another one")
    written = {
        role: list(role_files.write(output, role, source.variables[role])) for role in wanted
    }
    record = {
        "roles": written,
        "model": source.model,
        "convention": source.convention,
        "notes": source.notes,
        "flow": source.flow,
        "source": source.path.name,
    }
    files.write_json(output / EXPORT_FILE, record)


def check_agreement(
    source: WeightSource,
    model: dict[str, Any],
    convention: LatentConvention,
    wanted: tuple[str, ...],
) -> None:
    """Compares architecture (of the roles wanted) and latent convention with this run's.

    Converted weights state no convention and what their file shows: what both state is compared.

    Raises:
      ValueError: with every difference.
    """
    lines = []
    for role in wanted:
        ours, theirs = (m.get(role, {}) for m in (model, source.model))
        lines += _differences(role, ours, theirs, shared=not source.convention)
    if lines:
        raise ValueError(
            f"{source.path} holds another architecture: {'; '.join(lines)}; use the config that "
            "made it or start from other weights"
        )
    if source.convention:
        stated = LatentConvention.from_dict(source.convention)
        convention.check_equal(stated, here="this config", there=str(source.path))


def load_frozen(role: str, path: str, model: Any) -> dict[str, Tree]:
    """Variables of a frozen network from converted weights.

    Args:
      role: vit, lpips or dino.
      path: what `weights_conversion.convert` wrote.
      model: this run's model config, which the file's must equal where both state a value.

    Raises:
      ValueError: where there are no such weights, or of another architecture.
    """
    converted = conversion.load(path, (role,))
    if role in model:
        lines = _differences(role, model[role], converted.config[role], shared=True)
        if lines:
            raise ValueError(
                f"{path} holds another architecture: {'; '.join(lines)}; set --config.model.{role} "
                "to the file's or convert another file"
            )
    return converted.variables[role]


def require_frozen(role: str, random_ok: tuple[str, ...]) -> str:
    """The note for a frozen network that stays random.

    Raises:
      ValueError: where the config does not allow it in words.
    """
    if role not in random_ok and role not in CONVERSION_COMMANDS:
        raise ValueError(
            f"the frozen {NETWORKS[role]} needs weights, and init_from holds none; name a trained "
            "autoencoder, --config.init_from=runs/stage4, or say that random weights are wanted: "
            f"--config.random_frozen_ok={role},"
        )
    if role not in random_ok:
        raise ValueError(
            f"the frozen {NETWORKS[role]} needs weights; got none (weights.{role} is empty). "
            f"Convert them with `{CONVERSION_COMMANDS[role]}` and pass --config.weights.{role}="
            f"weights/..., or say that random ones are wanted: --config.random_frozen_ok={role},"
        )
    return (
        f"The frozen {NETWORKS[role]} is randomly initialised (random_frozen_ok names it): "
        "no pretrained knowledge is in these results."
    )


def _open_export(folder: pathlib.Path) -> WeightSource:
    record = json.loads((folder / EXPORT_FILE).read_text())
    variables = {
        role: role_files.read(folder, role_files.RoleFile(*file))
        for role, file in record["roles"].items()
    }
    return WeightSource(
        variables,
        record["model"],
        record["convention"],
        record["notes"],
        folder,
        record.get("flow", {}),
        files.file_sha256(folder / EXPORT_FILE),
    )


def _why_not(folder: pathlib.Path) -> str:
    if (folder / "chain.json").exists():
        stages = json.loads((folder / "chain.json").read_text())["stages"]
        return f"holds a chain; give one of its stages ({', '.join(stages)}), as in {folder}/NAME"
    state = "holds none of these" if folder.exists() else "does not exist"
    return f"{state}; give another path"


def _differences(role: str, ours: Any, theirs: Any, shared: bool) -> list[str]:
    """What differs between two model configs of a role, or between the fields they share."""
    one, other = _architecture(ours), _architecture(theirs)
    if shared:
        fields = one.keys() & other.keys()
        one, other = ({name: part[name] for name in fields} for part in (one, other))
    return config_lib.differences(one, other, f"model.{role}.")


def _architecture(part: Any) -> dict[str, Any]:
    """What is computed: one word for all stages is the same as a list that repeats it."""
    return {n: _one_word(value) for n, value in part.items() if n not in COMPUTE_FIELDS}


def _one_word(value: Any) -> Any:
    repeats = isinstance(value, list | tuple) and len(set(value)) == 1
    return value[0] if repeats and isinstance(value[0], str) else value
