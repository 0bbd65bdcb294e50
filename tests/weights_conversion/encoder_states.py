"""State dicts of tiny encoders and of RAE's autoencoder, in the published names."""

import re

import numpy as np

WIDTH, DEPTH, HIDDEN, SIDE = 32, 2, 64, 3


def draw(shapes, seed=0):
    random = np.random.default_rng(seed)
    return {k: (0.2 * random.normal(size=s)).astype(np.float32) for k, s in shapes.items()}


def blocks(name, depth, width, hidden, gated=False):
    """Facebook's names of a stack of blocks."""
    shapes = {}
    for i in range(depth):
        block = f"{name}.{i}"
        for part in ("norm1", "norm2"):
            shapes |= {f"{block}.{part}.weight": (width,), f"{block}.{part}.bias": (width,)}
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        first, last = ("mlp.w12", "mlp.w3") if gated else ("mlp.fc1", "mlp.fc2")
        layers |= {first: (hidden * (2 if gated else 1), width), last: (width, hidden)}
        for part, shape in layers.items():
            shapes |= {f"{block}.{part}.weight": shape, f"{block}.{part}.bias": shape[:1]}
    return shapes


def facebook(
    registers=4, gated=False, scales=True, patch=14, rows=SIDE**2 + 1, mask=True, width=WIDTH
):
    """DINOv2 or MAE in facebook's names."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, rows, width)}
    shapes |= {"register_tokens": (1, registers, width)} if registers else {}
    shapes |= {"mask_token": (1, width)} if mask else {}
    shapes |= {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **blocks("blocks", DEPTH, width, HIDDEN, gated),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if scales:
        shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for i in range(DEPTH) for j in (1, 2)}
    return draw(shapes)


TOP = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
SIGLIP_TOP = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
DINOV2 = {
    "attn.qkv": [f"attention.attention.{n}" for n in ("query", "key", "value")],
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
DINOV2_5 = DINOV2 | {
    "attn.qkv": [f"attention.{n}_proj" for n in "qkv"],
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.w12": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.w3": "mlp.down_proj",
}
BERT = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
MAE = DINOV2 | BERT | {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
MAE_5 = DINOV2_5 | BERT | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
SIGLIP = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": [f"self_attn.{n}_proj" for n in "qkv"],
    "attn.proj": "self_attn.out_proj",
}
RAE = MAE
DIFFUSERS = MAE | {
    "attn.qkv": [f"attention.to_{n}" for n in "qkv"],
    "attn.proj": "attention.to_out.0",
}


def renamed(state, top, names, block, prefix=""):
    """Facebook's names to others; fused tensors are cut where the others are separate."""
    found = {}
    for key, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.(?:weight|bias))?", key)
        if match:
            name, leaf = names.get(match[2], match[2]), match[3] or ""
            parts = name if isinstance(name, list) else [name]
            for part, piece in zip(parts, np.split(value, len(parts)), strict=True):
                found[f"{prefix}{block}.{match[1]}.{part}{leaf}"] = np.ascontiguousarray(piece)
            continue
        stem, dot, leaf = key.rpartition(".")
        new = f"{top[stem]}{dot}{leaf}" if stem in top else top[key]
        shape = value.shape[1:] if new.endswith("position_embedding.weight") else value.shape
        found[f"{prefix}{new}"] = value.reshape(shape)
    return found


def timm_registers(state):
    """Timm's form of DINOv2 with registers: no position of the class token, no mask token."""
    found = {k: v for k, v in state.items() if k != "mask_token"}
    found["reg_token"] = found.pop("register_tokens")
    found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def rae_decoder(latents=WIDTH, width=32, depth=2, hidden=48, grid=2, patch=16):
    """RAE's decoder in facebook-like names, to be renamed."""
    shapes = {
        "decoder_embed.weight": (width, latents),
        "decoder_embed.bias": (width,),
        "trainable_cls_token": (1, 1, width),
        "decoder_pos_embed": (1, grid**2 + 1, width),
        **blocks("blocks", depth, width, hidden),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
        "decoder_pred.weight": (3 * patch**2, width),
        "decoder_pred.bias": (3 * patch**2,),
    }
    return draw(shapes, 1)


DECODER_TOP = {
    name: name
    for name in (
        "decoder_embed",
        "trainable_cls_token",
        "decoder_pos_embed",
        "decoder_norm",
        "decoder_pred",
    )
}


def rae_files(side=2, width=WIDTH):
    """RAE's three files: encoder of Hugging Face, decoder, statistics."""
    encoder = renamed(facebook(width=width), TOP, DINOV2, "encoder.layer")
    decoder = renamed(rae_decoder(width, grid=side), DECODER_TOP, RAE, "decoder_layers")
    random = np.random.default_rng(2)
    statistics = {
        "mean": random.normal(size=(width, side, side)).astype(np.float32),
        "var": random.uniform(0.5, 2, size=(width, side, side)).astype(np.float32),
    }
    return encoder, decoder, statistics


def diffusers(side=2):
    """AutoencoderRAE's one file; its encoder's norm has no parameters."""
    encoder, _, statistics = rae_files(side)
    encoder = {k: v for k, v in encoder.items() if not k.startswith("layernorm")}
    decoder = renamed(rae_decoder(grid=side), DECODER_TOP, DIFFUSERS, "decoder_layers")
    del decoder["decoder_pos_embed"]
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
    return {
        "_latents_mean": statistics["mean"],
        "_latents_std": np.sqrt(statistics["var"]),
        **{f"decoder.{k}": v for k, v in decoder.items()},
        **{f"encoder.{k}": v for k, v in encoder.items()},
        "encoder_mean": mean,
        "encoder_std": std,
    }
