"""Where the weights of a stage come from, decided before anything is compiled.

For each role, in this order: `init_from` (the moving averages of another run), `weights.<role>`
(a converted file), a random initialisation. A role that is frozen may be random only where
`random_frozen_ok` names it; otherwise the run stops with the command that makes the weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import ml_collections
from etils import epath
from flax import traverse_util

from dinosae_jax import config as config_lib
from dinosae_jax import encoders, licences, names
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import buckets, files, lease, snapshots, untrusted
from dinosae_jax.weights import checkpoint, conversion, integrity, role_files

Tree = Any
Variables = dict[str, dict[str, Tree]]
FROZEN_FOLDER = "frozen"
EXPORT_FILE = "export.json"
MAX_EXPANSION = 100  # of a checkpoint, whose zeros are compressed
DONE = "DONE"  # in a stage's workdir: its last step, once it is saved
# Fields of the model config that change how it is computed, not what.
COMPUTE_FIELDS = ("scan_layers", "remat")
NETWORKS = {
    "stem": "stem",
    "vit": names.CONVERSIONS["vit"].network,
    "decoder": "decoder",
    "lpips": names.CONVERSIONS["lpips"].network,
    "dino": names.CONVERSIONS["dino"].network,
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
      weights: the manifest of the published weights among them, or that they were trained around:
        role -> an entry of `licences.entries`.
    """

    variables: Variables
    model: dict[str, Any]
    convention: dict[str, Any]
    notes: list[str]
    path: epath.Path
    flow: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    sha256: str = ""
    weights: dict[str, Any] = {}  # noqa: RUF012


def open_weights(path: str | os.PathLike) -> WeightSource:
    """Reads a workdir (its newest checkpoint), one checkpoint, or an export.

    Raises:
      ValueError: where nothing of the kind is there, or a file is damaged.
    """
    folder = files.path(path)
    here = _on_this_machine(folder)
    source = _open(here)
    return source._replace(path=folder / source.path.relative_to(here))


def _on_this_machine(folder: epath.Path) -> epath.Path:
    """A folder of weights; of one in a bucket a copy of what is read of it."""
    if not buckets.is_bucket(folder):
        return folder
    chosen = folder if is_folder_of_weights(folder) else checkpoint.newest(folder)
    if chosen is None:
        raise _refusal(folder)
    if not _is_checkpoint(chosen):
        return snapshots.local(chosen)
    workdir = chosen.parent.parent
    parts = (f"{checkpoint.FOLDER}/{chosen.name}/", f"{FROZEN_FOLDER}/")
    wanted = [name for name in buckets.listing(workdir) if name.startswith(parts)]
    return snapshots.local(workdir, wanted) / folder.relative_to(workdir)


def _open(folder: epath.Path) -> WeightSource:
    if (folder / EXPORT_FILE).exists():
        return _open_export(folder)
    if conversion.is_conversion(folder):
        converted = conversion.load(folder)
        titles = ", ".join(file["name"] for file in converted.metadata["files"])
        note = f"Starts from converted weights: {titles}."
        sha256 = files.file_sha256(folder / conversion.METADATA_FILE)
        model = {**converted.config, **converted.metadata.get("model", {})}
        weights = licences.entries(converted.metadata)
        return WeightSource(
            converted.variables, model, {}, [note], folder, sha256=sha256, weights=weights
        )
    step = folder if _is_checkpoint(folder) else checkpoint.newest(folder)
    if step is None:
        raise _refusal(folder)
    again = "take it from where it came once more, or an earlier one"
    untrusted.check_inside(folder, step, again)
    untrusted.check_tree_inside(step, again)
    integrity.check_seal(step)
    conversion.check_stored(step, step / "state", MAX_EXPANSION, again)
    # The discriminator's heads have no moving average; they are carried on as they are.
    try:
        tree, record = checkpoint.load_fields(step, ("ema", "extra", "params/disc_heads"))
    except (OSError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # Orbax has no class of its own
        raise conversion.not_whole(step, error, again) from None
    try:
        extra = tree.get("extra", {})
        params = {**tree["ema"], **tree.get("params", {})}
        variables: Variables = {
            role: {"params": params[role], **extra.get(role, {})} for role in params
        }
        frozen_files = dict(record["frozen"])
        stated = record["config"]["model"], record["convention"], record["notes"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{step} must be a checkpoint of this project; got one whose record lacks "
            f"{untrusted.short(error)}; {again}"
        ) from None
    frozen = step.parent.parent / FROZEN_FOLDER
    for role, file in frozen_files.items():
        if role not in variables:
            variables[role] = role_files.read(frozen, role_files.file_from(file, step))
    digest = integrity.digest(record)
    weights = record.get("weights", {})
    return WeightSource(variables, *stated, step, record.get("flow", {}), digest, weights)


def is_folder_of_weights(folder: epath.Path) -> bool:
    """Whether a folder is one checkpoint, an export or a conversion, so that nothing is chosen."""
    exported = (folder / EXPORT_FILE).exists()
    return exported or conversion.is_conversion(folder) or _is_checkpoint(folder)


def identity(source: WeightSource) -> dict[str, Any]:
    """Which weights these are, for records: path, step (None where there is none), sha256."""
    step = int(source.path.name) if _is_checkpoint(source.path) else None
    return {"path": str(source.path), "step": step, "sha256": source.sha256}


def _is_checkpoint(folder: epath.Path) -> bool:
    return folder.name.isdigit() and (folder / "state").exists()


def export(source: WeightSource, output: epath.Path, wanted: tuple[str, ...]) -> None:
    """Writes roles as one self-contained folder that `open_weights` reads.

    Raises:
      ValueError: where the folder already holds something.
    """
    if output.exists() and any(path.name != lease.FILE for path in output.iterdir()):
        raise ValueError(f"an export needs an empty folder; got {output}; name another folder")
    written = {
        role: list(role_files.write(output, role, source.variables[role])) for role in wanted
    }
    record = {
        "roles": written,
        "model": source.model,
        "convention": source.convention,
        "notes": source.notes,
        "flow": source.flow,
        "weights": source.weights,
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
    if "vit" in wanted:
        ours, theirs = ({"encoder": m.get("encoder") or "dinov3"} for m in (model, source.model))
        lines += config_lib.differences(ours, theirs, "model.")
    if lines:
        raise ValueError(
            f"weights and config are of one architecture; got {source.path}, which holds another "
            f"architecture: {'; '.join(lines)}; use the config that made it or start from other "
            "weights"
        )
    if source.convention:
        stated = LatentConvention.from_dict(source.convention)
        # The radius is the flow's: nothing of an autoencoder depends on it.
        free = () if "dit" in wanted else ("radius",)
        convention.check_equal(stated, "this config", str(source.path), leave_out=free)


def adopt_model(config: Any, explicit: Collection[str]) -> list[str]:
    """Gives a flow's config the autoencoder that `init_from` records, in place.

    Taken over are the fields of model.stem, model.vit and model.decoder, model.pixel_range,
    data.image_size where it is recorded, and of model.dit the input size and channels that follow.
    What was set by hand stays, and is compared when the weights are opened.

    Args:
      config: of a flow: it has `flow` and `init_from`.
      explicit: fields set by hand, such as 'model.vit.depth'.

    Returns:
      Lines `field: old -> new`.

    Raises:
      ValueError: where nothing of the kind is at `init_from`, or its record is damaged.
    """
    model, image_size = _stated_model(config.init_from)
    width = model.get("vit", {}).get("embed_dim", config.model.vit.embed_dim)
    side = (image_size or config.data.image_size) // names.PATCH_SIZE
    lines = [line for role in ("stem", "decoder") for line in _adopt_kind(config, role, model)]
    wanted = {
        f"model.{role}.{field}": value
        for role in names.AUTOENCODER_ROLES
        for field, value in model.get(role, {}).items()
        if field in {**config.model[role], **_left_out(role)} and field not in COMPUTE_FIELDS
    }
    wanted |= {"model.encoder": model.get("encoder")}
    wanted |= {"model.pixel_range": model.get("pixel_range"), "data.image_size": image_size}
    wanted |= {"model.dit.in_channels": width, "model.dit.input_size": side}
    for path, value in wanted.items():
        *parents, field = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        by_hand = any(f"{path}.".startswith(f"{given}.") for given in explicit)
        ours = node.get(field, _left_out(parents[-1]).get(field))
        differing = config_lib.differences(_one_word(ours), _one_word(value))
        if value is None or by_hand or not differing:
            continue
        lines.append(f"{path}: {ours} -> {value}")
        with node.unlocked(), node.ignore_type():
            node[field] = tuple(value) if isinstance(value, list) else value
    return lines


def _left_out(role: str) -> dict[str, Any]:
    """The values of fields that a config may leave out."""
    return {"vit": encoders.DINOV3, "model": {"encoder": "dinov3"}}.get(role, {})


def _adopt_kind(config: Any, role: str, model: dict[str, Any]) -> list[str]:
    """Replaces the whole config of a stem or decoder by one of another kind, in place."""
    stated = model.get(role, {})
    ours, theirs = (part.get("kind", "conv") for part in (config.model[role], stated))
    if not stated or ours == theirs:
        return []
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in stated.items()}
    with config.unlocked(), config.model.ignore_type():
        config.model[role] = ml_collections.ConfigDict(fields)
    return [f"model.{role}.kind: {ours} -> {theirs}"]


def _stated_model(path: str | os.PathLike) -> tuple[dict[str, Any], int | None]:
    """The model config that a workdir, checkpoint, export or conversion records; image size."""
    folder = files.path(path)
    again = "take the folder from where it came once more"
    if (folder / EXPORT_FILE).exists():
        record = untrusted.read_json(folder / EXPORT_FILE, again)
        tokens = _section(record, "convention", folder).get("tokens")
        side = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else None
        return _model_section(record, folder), names.PATCH_SIZE * side if side else None
    if conversion.is_conversion(folder):
        metadata = conversion.read_metadata(folder)
        model = {**metadata["config"], **metadata.get("model", {})}
        grid = model.get("decoder", {}).get("grid")
        return model, names.PATCH_SIZE * grid if grid else None
    step = folder.parent.parent if folder.name.isdigit() else folder
    if (step / "config.json").exists():
        record = untrusted.read_json(step / "config.json", again)
        size = _section(record, "data", folder).get("image_size")
        return _model_section(record, folder), size if isinstance(size, int) else None
    raise _refusal(folder)


def _model_section(record: dict[str, Any], folder: epath.Path) -> dict[str, Any]:
    model = _section(record, "model", folder)
    for role in names.AUTOENCODER_ROLES:
        _section({role: {}} | model, role, folder)
    return model


def _section(record: dict[str, Any], name: str, folder: epath.Path) -> dict[str, Any]:
    """One group of fields of a record; ValueError where it is missing or something else."""
    section = record.get(name)
    if not isinstance(section, dict):
        raise ValueError(
            f"the record of weights has a group of fields {name!r}; got "
            f"{untrusted.short(repr(section))} in {folder}; take it from where it came once more"
        )
    return section


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
    if role == "vit":
        _check_encoder(path, model, converted.metadata["kind"])
    if role in model:
        free = encoders.READING if role == "vit" else ()
        lines = _differences(role, model[role], converted.config[role], True, free)
        if lines:
            raise ValueError(
                f"weights and config must be of one architecture; got {path}, which holds another "
                f"architecture: {'; '.join(lines)}; set --config.model.{role} to the file's or "
                "convert another file"
            )
    variables = converted.variables[role]
    return read_blocks(variables, model["vit"]) if role == "vit" else variables


def manifest(path: str) -> dict[str, Any]:
    """The entries of `licences.entries` for converted weights, by role."""
    return licences.entries(conversion.read_metadata(path))


def _check_encoder(path: str, model: Any, kind: str) -> None:
    """Raises ValueError where converted weights are of another encoder than the config's."""
    wanted = encoders.family(model).kind
    if kind != wanted and not (kind == "dinosae" and wanted == "dinov3"):
        name = model.get("encoder") or "dinov3"
        raise ValueError(
            f"weights.vit must hold the encoder of the config, {name!r}, which is converted with "
            f"--kind={wanted}; got {path}, converted with --kind={untrusted.short(kind)}; name "
            "other weights, or take the encoder's own variant of the config"
        )


def read_blocks(variables: dict[str, Tree], vit: Any) -> dict[str, Tree]:
    """A ViT without the blocks above the last one that is read, which are never computed."""
    depth = encoders.run_depth(vit)
    params = variables["params"]
    cut = {
        path: leaf[:depth] for path, leaf in traverse_util.flatten_dict(params["blocks"]).items()
    }
    return {**variables, "params": {**params, "blocks": traverse_util.unflatten_dict(cut)}}


def check_effective(role: str, path: str, used: Tree, init_from: str, model: Any) -> None:
    """Compares the network that `init_from` gives with the one that `weights.<role>` names.

    Raises:
      ValueError: where they differ, so that `weights.<role>` would have no effect.
    """
    named = load_frozen(role, path, model)
    if role_files.sha256(named) != role_files.sha256(used):
        raise ValueError(
            f"init_from gives the {NETWORKS[role]} and comes first; got weights.{role}={path} too, "
            f"which holds another than {init_from} and would have no effect; leave out "
            f"--config.weights.{role}, or start from other weights"
        )


def require_frozen(role: str, random_ok: tuple[str, ...], model: Any) -> str:
    """The note for a frozen network that stays random.

    Raises:
      ValueError: where the config does not allow it in words.
    """
    if role not in random_ok and role not in names.CONVERSIONS:
        raise ValueError(
            f"the frozen {NETWORKS[role]} needs weights; got an init_from without them; name a "
            "trained autoencoder, --config.init_from=runs/sae_stage4, or say that random weights "
            f"are wanted: --config.random_frozen_ok={role},"
        )
    if role not in random_ok:
        raise ValueError(
            f"the frozen {_network(role, model)} needs weights; got none (weights.{role} is empty)"
            f". Convert them with `{encoders.conversion(role, model).command()}` and pass "
            f"--config.weights.{role}=weights/..., or say that random ones are wanted: "
            f"--config.random_frozen_ok={role},"
        )
    return (
        f"The frozen {_network(role, model)} is randomly initialised (random_frozen_ok names it): "
        "no pretrained knowledge is in these results."
    )


def _network(role: str, model: Any) -> str:
    return encoders.conversion(role, model).network if role == "vit" else NETWORKS[role]


def _open_export(folder: epath.Path) -> WeightSource:
    path = folder / EXPORT_FILE
    again = "export it again, or take the folder from where it came once more"
    untrusted.check_inside(folder, path, again)
    record = untrusted.read_json(path, again)
    fields = {"roles": dict, "model": dict, "convention": dict, "notes": list}
    wrong = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
    wrong += [n for n in ("flow", "weights") if not isinstance(record.get(n, {}), dict)]
    manifest = record.get("weights", {})
    if "weights" not in wrong and not all(isinstance(e, dict) for e in manifest.values()):
        wrong.append("weights")
    if wrong:
        raise ValueError(
            f"{path} is written by the job export; got another form of {', '.join(wrong)}; {again}"
        )
    variables = {
        role: role_files.read(folder, role_files.file_from(file, path))
        for role, file in record["roles"].items()
    }
    return WeightSource(
        variables,
        record["model"],
        record["convention"],
        [untrusted.short(note, 1000) for note in record["notes"]],
        folder,
        record.get("flow", {}),
        files.file_sha256(folder / EXPORT_FILE),
        record.get("weights", {}),
    )


def _refusal(folder: epath.Path) -> ValueError:
    return ValueError(
        "weights come from a stage's workdir, a checkpoint, an export or a conversion; got "
        f"{str(folder)!r}, which {_why_not(folder)}"
    )


def _why_not(folder: epath.Path) -> str:
    chain = folder / "chain.json"
    if chain.exists():
        stages = untrusted.read_json(chain, "name one of its folders").get("stages", ())
        listed = untrusted.short(", ".join(map(str, stages)), 300)
        return f"holds a chain; give one of its stages ({listed}), as in {folder}/NAME"
    state = "holds none of these" if folder.exists() else "does not exist"
    return f"{state}; give another path"


def _differences(
    role: str, ours: Any, theirs: Any, shared: bool, free: tuple[str, ...] = ()
) -> list[str]:
    """What differs between two model configs of a role, or between the fields they share.

    The fields `free` may differ.
    """
    one, other = (
        {**_left_out(role), **_architecture(part)} if part else {} for part in (ours, theirs)
    )
    one, other = ({n: v for n, v in part.items() if n not in free} for part in (one, other))
    if shared:
        fields = one.keys() & other.keys()
        one, other = ({name: part[name] for name in fields} for part in (one, other))
    return config_lib.differences(one, other, f"model.{role}.")


def _architecture(part: Any) -> dict[str, Any]:
    """What is computed: one word for all stages is the same as a list that repeats it."""
    if not hasattr(part, "items"):
        raise ValueError(
            f"the architecture of a role is a set of fields; got {untrusted.short(repr(part))}; "
            "export or convert the weights again"
        )
    return {n: _one_word(value) for n, value in part.items() if n not in COMPUTE_FIELDS}


def _one_word(value: Any) -> Any:
    words = isinstance(value, list | tuple) and value and isinstance(value[0], str)
    return value[0] if words and all(word == value[0] for word in value) else value
