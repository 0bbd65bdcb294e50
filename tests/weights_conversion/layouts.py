"""State dicts in the published layouts, by renaming facebook's and DC-AE's keys."""

import re

import numpy as np

from weights_conversion import convert
from weights_conversion.readers.safetensors_file import write_safetensors
from weights_conversion.verification.golden import read_golden

HUGGING_FACE = [
    (r"^blocks\.", "layer."),
    (r"^(cls|mask)_token$", r"embeddings.\1_token"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"attn\.proj\.", "attention.o_proj."),
    (r"ls(\d)\.gamma$", r"layer_scale\1.lambda1"),
    (r"mlp\.fc1\.", "mlp.up_proj."),
    (r"mlp\.fc2\.", "mlp.down_proj."),
]


def save(path, state):
    """Writes a state dict as .safetensors."""
    arrays = {key: np.asarray(value) for key, value in state.items()}
    entries = [(k, str(v.dtype), v.shape, lambda v=v: v) for k, v in arrays.items()]
    write_safetensors(path, entries, {})
    return path


def facebook(data_dir, name="c_dinov3_mlp"):
    """Weights and recording of a facebook file."""
    golden = read_golden(data_dir / "autoencoder" / f"{name}.safetensors")
    return golden.weights, golden


def official(data_dir, folder):
    """Converted weights of the recorded official autoencoder, without the teacher's convolution."""
    weights = read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights
    state = {k: v for k, v in weights.items() if not k.startswith("TEACHER_ONLY.")}
    file = save(folder / "official.safetensors", state)
    convert.convert_file("dinosae", [file], folder / "official")
    return folder / "official"


def hugging_face(weights, newer=False):
    """The published Hugging Face layout of a facebook state dict, or the newer prefix."""
    found = {}
    for key, value in weights.items():
        if key.endswith(("bias_mask", "periods")) or key.startswith("local_cls_norm"):
            continue
        name = key
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        if newer:
            name = re.sub(r"^layer\.", "model.layer.", name)
        if "attn.qkv" in name:
            parts = np.split(value, 3)
            for letter, part in zip("qkv", parts, strict=True):
                if not (letter == "k" and name.endswith("bias")):
                    found[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            found[name] = value[None] if name == "embeddings.mask_token" else value
    return found


def timm(weights, qkvb):
    """The layout of timm, with or without its q and v biases."""
    found = {}
    for key, value in weights.items():
        if key.endswith("attn.qkv.bias"):
            q, _, v = np.split(value, 3)
            base = key.removesuffix("qkv.bias")
            found |= {f"{base}q_bias": q, f"{base}v_bias": v} if qkvb else {}
        elif not key.endswith(("bias_mask", "periods", "mask_token")):
            name = re.sub(r"ls(\d)\.gamma$", r"gamma_\1", key)
            found[{"storage_tokens": "reg_token"}.get(name, name)] = value
    return found


def diffusers(weights):
    """Keys of diffusers' AutoencoderDC for an efficientvit decoder."""
    names = [
        (r"project_in\.main\.conv", "conv_in"),
        (r"project_out\.op_list\.0", "norm_out"),
        (r"project_out\.op_list\.2", "conv_out"),
        (r"conv_out\.conv\.conv", "conv_out.conv"),
        (r"stages\.(\d+)\.op_list\.", r"up_blocks.\1."),
        (r"main\.(conv\d?)\.conv", r"\1"),
        (r"main\.conv2\.norm", "norm"),
        (r"context_module\.main\.proj\.conv", "attn.to_out"),
        (r"context_module\.main\.proj\.norm", "attn.norm_out"),
        (r"local_module\.main\.(\w+?)_conv\.conv", r"conv_out.conv_\1"),
        (r"local_module\.main\.point_conv\.norm", "conv_out.norm"),
    ]
    found = {}
    for key, value in weights.items():
        name = key
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name.endswith("context_module.main.qkv.conv.weight"):
            base = name.removesuffix("context_module.main.qkv.conv.weight")
            for letter, part in zip("qkv", np.split(value[:, :, 0, 0], 3), strict=True):
                found[f"{base}attn.to_{letter}.weight"] = part
        else:
            found[name] = value[:, :, 0, 0] if name.endswith("attn.to_out.weight") else value
    return found
