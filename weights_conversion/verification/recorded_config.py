"""The recorded configurations of the references in the words of our modules, by kind."""

from __future__ import annotations

import dataclasses
from typing import Any

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.dit import LightningDiT
from dinosae_jax.sizes import from_dcae

Config = dict[str, Any]

SWIGLU_ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def vit(config: Config) -> Config:
    """Facebook's constructor arguments, or transformers' `hf_config`."""
    if "hf_config" in config:
        return _from_hugging_face(config["hf_config"])
    names = {
        "embed_dim": "embed_dim",
        "depth": "depth",
        "num_heads": "num_heads",
        "qkv_bias": "qkv_bias",
        "n_storage_tokens": "num_storage_tokens",
        "patch_size": "patch_size",
    }
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if "ffn_ratio" in config and "embed_dim" in config:
        layer = config.get("ffn_layer", "mlp")
        hidden = int(config["embed_dim"] * config["ffn_ratio"])
        if layer != "mlp":
            align = SWIGLU_ALIGNMENT[layer]
            hidden = -(-int(hidden * 2 / 3) // align) * align
        found |= {"ffn_hidden": hidden, "ffn_layer": "mlp" if layer == "mlp" else "swiglu"}
    return found


def _from_hugging_face(config: Config) -> Config:
    names = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden",
        "query_bias": "qkv_bias",
        "num_register_tokens": "num_storage_tokens",
        "patch_size": "patch_size",
    }
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if "use_gated_mlp" in config:
        found["ffn_layer"] = "swiglu" if config["use_gated_mlp"] else "mlp"
    return found


def decoder(config: Config) -> Config:
    """DecoderConfig of DINO-SAE; fields that are not listed have its defaults."""
    return {
        field.name: config.get(field.name, field.default)
        for field in dataclasses.fields(Decoder)
        if field.name in config or field.name in _DECODER_DEFAULTS
    }


_DECODER_DEFAULTS = (
    "in_channels",
    "in_shortcut",
    "block_type",
    "norm",
    "act",
    "upsample_block_type",
    "upsample_match_channel",
    "upsample_shortcut",
    "out_norm",
    "out_act",
)


def dcae_decoder(config: Config) -> Config:
    """DecoderConfig of efficientvit, whose "trms2d" is another norm."""
    return from_dcae(decoder(config))


def diffusion_transformer(config: Config, model: type) -> Config:
    """Constructor arguments of either transformer; ours have the reference's names."""
    own = {field.name for field in dataclasses.fields(model)} - {"parent", "name"}
    return {name: value for name, value in config.items() if name in own}


def encoder(config: Config) -> Config:
    """Constructor arguments of transformers' and facebook's encoders; all tell the same."""
    own = config["config"]
    names = {"num_attention_heads": "num_heads", "num_heads": "num_heads"}
    names |= {"layer_norm_eps": "norm_eps"}
    return {ours: own[theirs] for theirs, ours in names.items() if theirs in own}


def rae_decoder(config: Config) -> Config:
    """Constructor arguments of AutoencoderRAE; the grid is that of its encoder."""
    own = config["config"]
    return {
        "num_heads": own["decoder_num_attention_heads"],
        "grid": own["encoder_input_size"] // own["encoder_patch_size"],
    }


def overrides(kind: str, config: Config) -> dict[str, Config]:
    """What a recorded configuration says, by role.

    Args:
      kind: A key of `tables.KINDS`.
      config: The JSON of a file's header.

    Returns:
      Role -> keyword arguments, for `tables.plan`.
    """
    found = {
        "dinov3": lambda: {"vit": vit(config)},
        "eupe": lambda: {"vit": vit(config["config"])},
        **dict.fromkeys(("dinov2", "siglip2", "mae"), lambda: {"vit": encoder(config)}),
        "rae_decoder": lambda: {"decoder": rae_decoder(config)},
        "rae_autoencoder": lambda: {"decoder": rae_decoder(config)},
        "dinosae": lambda: {
            "vit": vit(config.get("dino", {})),
            "decoder": decoder(config.get("decoder", {})),
        },
        "dinosae_decoder": lambda: {"decoder": decoder(config)},
        "dcae_decoder": lambda: {"decoder": dcae_decoder(config)},
        "lightningdit": lambda: {"dit": diffusion_transformer(config, LightningDiT)},
        "rae_lightningdit": lambda: {"dit": diffusion_transformer(config, LightningDiT)},
        "rae_ditdh": lambda: {"dit": diffusion_transformer(config, DiTDH)},
    }
    return found.get(kind, dict)()
