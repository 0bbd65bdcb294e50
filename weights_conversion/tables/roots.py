"""How each kind of network is recognised inside a file: keys that lie at its root.

A file may hold a network below a prefix, beside others: a training checkpoint has `backbone.*` and
`dino_head.*`, a classifier `dinov3_vit.*` and `classifier.*`. Each kind lists patterns, the surest
first; what stands before the first that occurs anywhere is where the network begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_DIT = (r"x_embedder\.proj\.", r"t_embedder\.mlp\.", r"final_layer\.linear\.")
_DECODER = (
    r"(?:project_in|project_out|stages\.\d+\.op_list|conv_in|conv_out|norm_out|up_blocks\.\d+)\."
)

_DINOV3 = (
    r"embeddings\.(?:cls_token|mask_token|register_tokens|patch_embeddings\.(?:weight|bias))$",
    r"blocks\.\d+\.(?:ls[12]\.gamma|gamma_[12])$",
    r"blocks\.\d+\.attn\.",
    r"(?:model\.)?layer\.\d+\.attention\.",
)
_PATCHES = r"embeddings\.patch_embeddings\.projection\."

ROOTS: dict[str, tuple[str, ...]] = {
    "dinov3": _DINOV3,
    "eupe": _DINOV3,
    "dinov2": (_PATCHES, r"blocks\.\d+\.attn\."),
    "siglip2": (r"embeddings\.patch_embedding\.", r"blocks\.\d+\.attn\."),
    "mae": (_PATCHES, r"blocks\.\d+\.attn\."),
    "rae_decoder": (r"decoder\.decoder_embed\.", r"decoder_embed\.", r"(?:mean|var)$"),
    "rae_autoencoder": (
        r"decoder\.decoder_embed\.",
        r"decoder_embed\.",
        r"embeddings\.patch_embeddings?\.",
        r"(?:mean|var)$",
    ),
    "dinosae": (r"dino_model\.(?:blocks|cls_token|patch_embed|norm)\b", rf"decoder\.{_DECODER}"),
    "dinosae_stem": (r"cnn\.\d+\.conv\.",),
    "dinosae_decoder": (_DECODER,),
    "dcae_decoder": (rf"decoder\.{_DECODER}", _DECODER),
    "lightningdit": _DIT,
    "rae_lightningdit": _DIT,
    "rae_ditdh": (r"s_embedder\.proj\.", *_DIT),
    "dino_discriminator": (r"heads\.\d+\.", r"blocks\.\d+\.attn\.", r"(?:cls_token|pos_embed)$"),
    "lpips_vgg16": (r"lin\d\.model\.", r"net\.slice\d\.", r"features\.\d+\.(?:weight|bias)$"),
    "inception_fid": (r"Mixed_\d[a-z]\.", r"Conv2d_\d[a-z]_\dx\d\."),
    "efficientnet_lite0": (r"_blocks\.\d+\.", r"_conv_stem\."),
}
PARTS = ("dino_discriminator", "lpips_vgg16", "rae_decoder", "rae_autoencoder")
"""Kinds of which each file may hold another network, so that each has its own prefix."""


def prefixes(kind: str, keys: Iterable[str]) -> list[str]:
    """What stands before each network of a kind, such as `['student.backbone.']`.

    Args:
      kind: A key of `ROOTS`.
      keys: Names of tensors.

    Returns:
      The prefixes in the keys' order, '' where a network lies at the root; none where the keys show
      no network of the kind.
    """
    keys = list(keys)
    for root in ROOTS[kind]:
        pattern = re.compile(rf"(?:^|(?<=\.)){root}")
        matches = ((key, pattern.search(key)) for key in keys)
        found = dict.fromkeys(key[: match.start()] for key, match in matches if match)
        if found:
            return list(found)
    return []
