"""Reads the directory that `weights_conversion.convert` writes.

DIR/conversion.json tells kind, layout, source file and configuration; DIR/weights is an Orbax
checkpoint of {role: {collection: tree}} in the source's dtypes, and `buffers`, the source's tensors
that no model reads. What the reference does to its weights at run time is done here, once: the key
part of DINOv3's qkv bias is masked.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

METADATA_FILE = "conversion.json"
WEIGHTS_FOLDER = "weights"
FORMAT_VERSION = 1

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Converted weights, ready for `module.apply(variables[role], ...)`.

    Attributes:
      variables: Role -> collection ("params", "batch_stats", "spectral") -> tree of numpy arrays.
      config: Role -> keyword arguments of the role's module.
      metadata: The whole of conversion.json.
    """

    variables: dict[str, dict[str, Tree]]
    config: dict[str, dict[str, Any]]
    metadata: dict[str, Any]

    @property
    def params(self) -> dict[str, Tree]:
        """Parameters by role, without the other collections."""
        return {role: variables["params"] for role, variables in self.variables.items()}


def is_conversion(directory: str | Path) -> bool:
    """Whether a directory holds converted weights."""
    return (Path(directory) / METADATA_FILE).is_file()


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Reads conversion.json.

    Raises:
      ValueError: There is none, or it is damaged or of another version.
    """
    path = Path(directory) / METADATA_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no converted weights ({METADATA_FILE} is missing): make them with "
            "python -m weights_conversion.convert --kind=K --input=FILE --output=DIR"
        )
    try:
        metadata = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged: convert the weights again") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}: convert the weights again"
        )
    return metadata


def load(directory: str | Path, roles: Collection[str] | None = None) -> Weights:
    """Loads converted weights as float32, masks applied.

    Args:
      directory: What `weights_conversion.convert` wrote.
      roles: The roles wanted; None for all.

    Returns:
      The weights.

    Raises:
      ValueError: The directory holds no converted weights, or not these roles.
    """
    metadata = read_metadata(directory)
    config = metadata["config"]
    missing = set(roles or ()) - set(config)
    if missing:
        raise ValueError(
            f"{directory} holds the roles {', '.join(config)}, not {', '.join(sorted(missing))}: "
            f"convert a file that has them"
        )
    stored = restore(directory, metadata)
    buffers = stored.pop("buffers", {})
    wanted = config if roles is None else roles
    variables = {role: as_float32(stored[role]) for role in wanted}
    if "vit" in variables:
        mask_key_bias(variables["vit"]["params"], buffers)
    return Weights(variables, {role: config[role] for role in wanted}, metadata)


def restore(directory: str | Path, metadata: dict[str, Any]) -> Tree:
    """The stored tree, every tensor in its source's dtype: {role: ..., "buffers": {key: array}}."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(Path(directory).absolute() / WEIGHTS_FOLDER)
    for target, (shape, dtype) in metadata["empty"].items():  # Orbax stores no empty arrays
        parts = target.split("/") if not target.startswith("buffers/") else target.split("/", 1)
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = np.zeros(shape, dtype)
    return tree


def as_float32(tree: Tree) -> Tree:
    """Converts every floating leaf to float32; others stay."""
    if isinstance(tree, Mapping):
        return {key: as_float32(value) for key, value in tree.items()}
    is_float = np.issubdtype(tree.dtype, np.floating) or tree.dtype.name == "bfloat16"
    return tree.astype(np.float32, copy=False) if is_float else tree


def mask_key_bias(vit: Tree, buffers: Mapping[str, np.ndarray]) -> None:
    """Masks the key part of DINOv3's qkv bias, in place.

    Where a file has `bias_mask` the bias is multiplied by it; a mask that was never filled is NaN
    and counts as absent. Without a mask the key part is zero, as in every published model.

    Args:
      vit: Parameters of `VisionTransformer`.
      buffers: Source key -> tensor, with the masks `...blocks.N.attn.qkv.bias_mask` if any.
    """
    qkv = vit["blocks"]["attn"]["qkv"]
    if "bias" not in qkv:
        return
    width = qkv["bias"].shape[-1] // 3
    mask = np.ones_like(qkv["bias"])
    mask[:, width : 2 * width] = 0
    for key, stored in buffers.items():
        match = re.search(r"blocks\.(\d+)\.attn\.qkv\.bias_mask$", key)
        if match:
            row = int(match[1])
            mask[row] = np.where(np.isnan(stored), mask[row], stored)
    # Not a product alone: a masked value counts as zero even where it is not finite.
    qkv["bias"] = np.where(mask == 0, 0, qkv["bias"] * mask).astype(np.float32)
