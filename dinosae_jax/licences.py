"""The manifest of converted weights: where each comes from, its licence and what that asks for.

Checkpoints and exports carry it. The licences were looked up where the weights are published; what
counts is the text that comes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Terms(NamedTuple):
    """The licence of published weights.

    Attributes:
      origin: where they are published.
      licence: its name.
      permissive: whether what is derived may be used and passed on for any purpose.
      asks: what it asks of who passes on what is derived.
    """

    origin: str
    licence: str
    permissive: bool
    asks: str


_NOTICE = "keep the licence and the copyright notices"
_NO_TRADE = "no commercial use"
_DINOV3 = Terms(
    "facebookresearch/dinov3",
    "DINOv3 License",
    False,
    "pass on under the same licence, with a copy of it; name DINOv3 in publications",
)


def _apache(origin: str) -> Terms:
    return Terms(origin, "Apache-2.0", True, _NOTICE)


def _mit(origin: str) -> Terms:
    return Terms(origin, "MIT", True, _NOTICE)


TERMS: dict[str, Terms] = {
    "dinov3": _DINOV3,
    "dinosae": _DINOV3._replace(origin="DINO-SAE, around facebookresearch/dinov3"),
    "dinov2": _apache("facebookresearch/dinov2"),
    "webssl": Terms("facebookresearch/webssl", "CC BY-NC 4.0", False, _NO_TRADE),
    "siglip2": _apache("google/siglip2"),
    "mae": _apache("Hugging Face, facebook/vit-mae"),
    "mae_pth": Terms("facebookresearch/mae", "CC BY-NC 4.0", False, _NO_TRADE),
    "eupe": Terms("facebookresearch/EUPE", "FAIR Noncommercial Research License", False, _NO_TRADE),
    "rae_decoder": _mit("bytetriper/RAE"),
    "rae_autoencoder": _mit("bytetriper/RAE"),
    "rae_ditdh": _mit("bytetriper/RAE"),
    "rae_lightningdit": _mit("bytetriper/RAE"),
    "lightningdit": _mit("hustvl/LightningDiT"),
    "dcae_decoder": _apache("mit-han-lab/efficientvit"),
    "dino_discriminator": _apache("facebookresearch/dino"),
    "lpips_vgg16": Terms("richzhang/PerceptualSimilarity", "BSD-2-Clause", True, _NOTICE),
    "inception_fid": _apache("mseitzer/pytorch-fid"),
    "efficientnet_lite0": _apache("rwightman/gen-efficientnet-pytorch"),
}
"""Kind of a conversion -> the terms of its weights; WebSSL and MAE's .pth are told apart."""


def entries(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest of converted weights.

    Args:
      metadata: of conversion.json: kind, layout, files, config.

    Returns:
      Role -> origin, licence, permissive, asks and files (name and sha256), ready for JSON.
    """
    files = [{"name": f.get("name"), "sha256": f.get("sha256")} for f in metadata["files"]]
    found = {}
    for role in metadata["config"]:
        terms = TERMS.get(_published(metadata, role))
        if terms:
            found[role] = {**terms._asdict(), "files": files}
    return found


def _published(metadata: Mapping[str, Any], role: str) -> str:
    """The key of `TERMS` for one role of a conversion."""
    kind = str(metadata["kind"])
    if kind == "rae_autoencoder" and role != "decoder":
        kind = str(metadata.get("model", {}).get("encoder", "")).removeprefix("rae_")
    vit = metadata["config"].get("vit", {})
    if kind == "dinov2" and vit.get("table_side") != 37:
        return "webssl"
    if kind == "mae" and not str(metadata["layout"]).startswith("huggingface"):
        return "mae_pth" if metadata["kind"] == "mae" else kind
    return kind


def sentence(role: str, entry: Mapping[str, Any]) -> str:
    """One line about the weights of a role, for the terminal."""
    origin, licence, asks = (entry.get(name, "unknown") for name in ("origin", "licence", "asks"))
    return f"{role}: weights of {origin}, {licence}; passing on what is derived from them: {asks}"


def require_permissive(weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses weights that a permissive export must not hold.

    Args:
      weights: role -> entry of the manifest.

    Raises:
      ValueError: one line, for the first role whose licence is not permissive.
    """
    for role, entry in weights.items():
        if entry.get("permissive") is not True:
            raise ValueError(
                "an export with permissive=True holds and derives from weights that may be used "
                f"for any purpose; got {role} of {entry.get('origin')}, {entry.get('licence')}; "
                "train around DINOv2, SigLIP2 or MAE, or leave permissive out"
            )
