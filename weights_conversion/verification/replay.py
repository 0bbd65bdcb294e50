"""Runs our modules on recorded inputs and names what they compute as the recordings do.

Each function takes modules and variables by role, and a `Golden`; it returns name -> array for
everything that the modules can expose, in the recording's layout.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax import names
from dinosae_jax.encoders import FAMILIES
from dinosae_jax.models import preprocessing, vit_decoder
from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.vit import VisionTransformer, ViTOutput
from dinosae_jax.models.vit_decoder import ViTDecoder
from weights_conversion.verification import reference_guidance as guidance
from weights_conversion.verification.golden import Golden, nchw, nhwc

Modules = dict[str, Any]
Variables = dict[str, Any]
Outputs = dict[str, Any]


def stem(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """`NAME` [b, h, w, d]; `NAME.layerI.conv` and `.out`, NCHW."""

    @jax.jit
    def run(images):
        module = modules["stem"]
        return module.apply(
            variables["stem"], images, capture_intermediates=True, mutable=["intermediates"]
        )

    found: Outputs = {}
    for name, images in golden.inputs.items():
        found[name], state = run(nhwc(images))
        for layer, inside in state["intermediates"].items():
            if layer == "__call__":
                continue
            prefix = f"{name}.layer{layer.removeprefix('cnn_')}"
            found[f"{prefix}.out"] = nchw(inside["__call__"][0])
            found[f"{prefix}.conv"] = nchw(inside["conv"]["__call__"][0])
    return found


def decoder(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """`NAME` the image, `NAME.project_in` and `NAME.stageI`; NCHW."""

    @jax.jit
    def run(z):
        module = modules["decoder"]
        layers = module.apply(variables["decoder"], z, method=Decoder.trunk)
        return {"": module.apply(variables["decoder"], z), **layers}

    found: Outputs = {}
    for name, z in golden.inputs.items():
        layers = run(nhwc(z))
        found |= {f"{name}.{key}".rstrip("."): nchw(value) for key, value in layers.items()}
    return found


def vit(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """Facebook's `forward_features` and transformers' `last_hidden_state`, and what is inside."""
    module, weights = modules["vit"], variables["vit"]

    @jax.jit
    def run(images, mask):
        patches = module.apply(weights, images, method=VisionTransformer.embed_patches)
        return module.apply(weights, patches, mask, intermediates=True)

    found: Outputs = {}
    for name, images in golden.inputs.items():
        if name.startswith("mask_"):
            continue
        result = run(nhwc(images), golden.inputs.get(f"mask_{name}"))
        found |= {f"{name}.{key}": value for key, value in _vit_outputs(result).items()}
    return found


def _vit_outputs(result: ViTOutput) -> Outputs:
    inside = dict(result.intermediates or {})
    blocks = {key: inside.pop(key) for key in ("after_attn", "out")}
    tokens = [result.cls[:, None], result.storage, result.patches]
    return {
        "x_norm_clstoken": result.cls,
        "x_storage_tokens": result.storage,
        "x_norm_patchtokens": result.patches,
        "x_prenorm": result.prenorm,
        "last_hidden_state": jnp.concatenate(tokens, axis=1),
        **inside,
        **{f"block{i}.{k}": v[i] for k, v in blocks.items() for i in range(len(v))},
    }


def autoencoder(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """Tokens and reconstruction of the official model, teacher tokens and their cosine."""

    def tokens(patches):
        return modules["vit"].apply(variables["vit"], patches)

    @jax.jit
    def run(images):
        patches = modules["stem"].apply(variables["stem"], images)
        student = tokens(patches)
        grid = student.patches.reshape(patches.shape)
        image = modules["decoder"].apply(variables["decoder"], grid)
        found = {"patch_tokens": student.patches, "cls_token": student.cls, "recon": image}
        if "patch_embed" not in variables["vit"]["params"]:
            return found
        embed = VisionTransformer.embed_patches
        own = modules["vit"].apply(variables["vit"], images, method=embed)
        if own.shape != patches.shape:  # the stem rounds the grid up, the patch convolution down
            return found
        teacher = tokens(own).patches
        cosine = _cosine(student.patches, teacher)
        mean = jnp.mean(1 - cosine)[None]
        return found | {
            "teacher_patch_tokens": teacher,
            "cosine_per_token": cosine,
            "align_loss_mean": mean,
        }

    found: Outputs = {}
    for name, images in golden.inputs.items():
        result = {key: np.asarray(value) for key, value in run(nhwc(images)).items()}
        result["recon"] = nchw(result["recon"])
        found |= {f"{name}.{key}": value for key, value in result.items()}
    return found


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Function cosine_similarity of torch over the last axis: each norm is at least 1e-8."""
    norms = [jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8) for x in (a, b)]
    return jnp.sum(a * b, axis=-1) / (norms[0] * norms[1])


def transformer(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """Velocity, module outputs, and the reference's guided outputs under their recorded names."""
    inputs = golden.inputs
    run = {
        role: jax.jit(functools.partial(modules[role].apply, variables[role], intermediates=True))
        for role in modules
    }
    x, t, y = nhwc(inputs["x"]), inputs["t"], inputs["y"].astype(np.int32)
    velocity, inside = run["dit"](x, t, y)
    found: Outputs = {"v": nchw(velocity), **inside}
    if "s_given" in inputs:
        given, _ = run["dit"](x, t, y, encoder_state=inputs["s_given"])
        found["v_with_s_given"] = nchw(given)
    models = {role: lambda x, t, y, f=f: f(x, t, y)[0] for role, f in run.items()}
    for name in golden.outputs:
        if name.startswith("cfg_"):
            found[name] = nchw(_guided(name, inputs, models["dit"]))
        elif name.startswith("autoguidance_") and "guide" in models:
            interval = isinstance(modules["dit"], DiTDH)
            found[name] = nchw(_autoguided(name, golden, models, interval))
    return found


def _numbers(name: str) -> tuple[list[float], list[tuple[float, float]]]:
    """The numbers in a name, and the same as intervals."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", name)]
    return numbers, list(zip(numbers[::2], numbers[1::2], strict=False))


def _guided(name: str, inputs: dict[str, np.ndarray], model: Callable) -> jax.Array:
    """Classifier-free guidance of the class that the output's name tells."""
    arguments = model, *_guided_inputs(inputs), inputs["cfg_scale"]
    numbers, pairs = _numbers(name)
    if name.startswith(("cfg_no_interval", "cfg_interval_start_")):
        start = numbers[0] if numbers else None
        return guidance.lightningdit_cfg(*arguments, start)
    if name.startswith(("cfg_empty_interval", "cfg_interval_list_")):
        # Inside the list guidance is off, or has another scale if that is above 1.
        inner = numbers[-1] if "_intervalcfg_" in name else 1.0
        return guidance.rae_lightningdit_cfg(*arguments, pairs, max(inner, 1.0))
    return guidance.ditdh_cfg(*arguments, *pairs[:1])


def _autoguided(
    name: str, golden: Golden, models: dict[str, Callable], interval: bool
) -> jax.Array:
    """Autoguidance of DiT^DH, which has an interval, or of RAE's LightningDiT."""
    scale = golden.config["autoguidance_scale"]
    arguments = models["dit"], models["guide"], *_guided_inputs(golden.inputs), scale
    if not interval:
        return guidance.rae_lightningdit_autoguidance(*arguments)
    return guidance.ditdh_autoguidance(*arguments, *_numbers(name)[1][:1])


def _guided_inputs(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return nhwc(inputs["cfg_x"]), inputs["cfg_t"], inputs["cfg_y"].astype(np.int32)


def encoder(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """Hidden states and tokens of normalised images; of `raw` ones RAEv2's tokens."""
    module, weights = modules["vit"], variables["vit"]

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, images, mask=None):
        patches = module.apply(weights, images, method=VisionTransformer.embed_patches)
        return module.apply(weights, patches, mask, intermediates=True)

    found: Outputs = {}
    layers = tuple(golden.config.get("mls_layers", ()))
    for name, images in golden.inputs.items():
        if name.startswith("mask_"):
            continue
        if name == "raw":
            found |= _raw_outputs(run, module, weights, golden)
            continue
        image = nhwc(images)
        result = run(module, image, golden.inputs.get(f"mask_{name}"))
        plain = run(module.clone(final_norm="plain"), image, golden.inputs.get(f"mask_{name}"))
        grid = image.shape[1] // module.patch_size, image.shape[2] // module.patch_size
        exposed = _encoder_outputs(result, plain) | _positions(module, weights, "pos", grid)
        if layers and not module.class_token:  # SigLIP2's reading of several layers
            several = module.clone(layers=layers, token_mean=True)
            exposed["mls"] = run(several, image).patches
        found |= {f"{name}.{key}": value for key, value in exposed.items()}
    return found


def _encoder_outputs(result: ViTOutput, plain: ViTOutput) -> Outputs:
    inside = result.intermediates or {}
    states = [inside["tokens_in"], *inside["out"]]
    has_prefix = result.patches.shape[1] < result.prenorm.shape[1]
    cls = [result.cls[:, None]] if has_prefix else []
    tokens = jnp.concatenate([*cls, result.storage, result.patches], axis=1)
    return _vit_outputs(result) | {
        "cls": result.cls,
        "patch_tokens": result.patches,
        "patch_tokens_noaffine": plain.patches,
        "last_hidden_state": tokens,
        "last_hidden_state_noaffine": plain.patches,
        "x_norm_regtokens": result.storage,
        **{f"hidden_state{i}": state for i, state in enumerate(states)},
    }


def _positions(
    module: VisionTransformer, weights: Variables, name: str, grid: tuple[int, int]
) -> Outputs:
    """The stored table of positions on a grid, if there is one."""
    if module.positions == "rope":
        return {}
    parts: Any = module.apply(weights, *grid, method="position_table")
    return {name: jnp.concatenate(parts, axis=1)}


def _raw_outputs(
    run: Callable, module: VisionTransformer, weights: Variables, golden: Golden
) -> Outputs:
    """What RAEv2 makes of images of 8 bits: its own norm, and one or several layers."""
    layers = tuple(golden.config["mls_layers"])
    images = jnp.asarray(nhwc(golden.inputs["raw"]), jnp.float32) / 255
    is_dinov2 = module.positions != "rope"
    family = FAMILIES["raev2_dinov2" if is_dinov2 else "raev2_eupe"]
    size = (224, 224) if is_dinov2 else (64, 64)
    image = preprocessing.fit(images, family.preprocessing, size)
    # RAEv2 resizes the table once, by timm's rule.
    module = module.clone(table_resize="bicubic_antialias")
    one = module.clone(**{k: family.vit[k] for k in ("final_norm", "final_norm_eps")})
    several = one.clone(layers=layers, layer_sum=family.vit.get("layer_sum", False))
    tokens = run(several, image).patches
    return _positions(module, weights, "raw.pos16", (16, 16)) | {
        "raw.preprocessed": nchw(image),
        "raw.raev2": run(one, image).patches,
        "raw.raev2_norm": run(module, image).patches,
        "raw.raev2_mls": tokens,
        "raw.raev2_mls_sum": tokens,
        "raw.raev2_mls_clstoken": jnp.mean(tokens, axis=1),
    }


def rae(modules: Modules, variables: Variables, golden: Golden) -> Outputs:
    """RAE's decoder on latents; with an encoder also its latents and reconstructions of images."""
    module, weights = modules["decoder"], dict(variables["decoder"])
    inputs = golden.inputs
    statistics = weights.get("statistics", {})
    if "latent_var" in inputs:  # RAE's own, a file beside the decoder's
        statistics = {"mean": inputs["latent_mean"], "variance": inputs["latent_var"]}
    found: Outputs = {}
    for name, value in inputs.items():
        if name.startswith("z"):
            found |= {f"{name}.{k}": x for k, x in _decoded(module, weights, statistics, value)}
        elif name.startswith("image") and "vit" in modules:
            found |= {
                f"{name}.{k}": x for k, x in _rebuilt(modules, variables, statistics, golden, name)
            }
    return found


def _decoded(
    module: ViTDecoder, weights: Variables, statistics: Variables, latents: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Outputs of latents [b, d, h, w] of deviation 1, by name."""
    b, d, *grid = latents.shape
    rows = jnp.asarray(latents).reshape(b, d, -1).swapaxes(1, 2)
    z = vit_decoder.restore(statistics, rows).reshape(b, *grid, d)
    yield "denormalised", nchw(z)
    for i in range(module.depth):
        blocks = jax.tree.map(lambda leaf, end=i + 1: leaf[:end], weights["params"]["blocks"])
        cut = {**weights, "params": {**weights["params"], "blocks": blocks}}
        yield f"layer{i}.out", module.clone(depth=i + 1).apply(cut, z, method="trunk")
    features = module.apply(weights, z, method="features")
    image: Any = module.apply(weights, features, method="head")
    p, side = module.patch_size, module.grid
    patches = image.reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
    yield "logits", patches.reshape(b, side * side, -1)
    yield "image", nchw(image * np.array(names.IMAGENET_STD) + np.array(names.IMAGENET_MEAN))


def _rebuilt(
    modules: Modules, variables: Variables, statistics: Variables, golden: Golden, name: str
) -> Iterator[tuple[str, Any]]:
    """Outputs of images in [0, 1], by name."""
    size = (golden.config["config"]["encoder_input_size"],) * 2
    preprocessed = FAMILIES["rae_dinov2"].preprocessing
    prepared = preprocessing.fit(jnp.asarray(nhwc(golden.inputs[name])), preprocessed, size)
    yield "encoder_input", nchw(prepared)
    patches = modules["stem"].apply(variables["stem"], prepared)
    tokens = modules["vit"].apply(variables["vit"], patches).patches
    yield "tokens_unnormalised", tokens
    latent = nchw(vit_decoder.standardise(statistics, tokens).reshape(patches.shape))
    yield "latent", latent
    decoded = dict(_decoded(modules["decoder"], variables["decoder"], statistics, latent))
    yield "recon", decoded["image"]


REPLAYS: dict[str, Callable[[Modules, Variables, Golden], Outputs]] = {
    "dinosae_stem": stem,
    "dinosae_decoder": decoder,
    "dcae_decoder": decoder,
    "dinov3": vit,
    "eupe": encoder,
    "dinov2": encoder,
    "siglip2": encoder,
    "mae": encoder,
    "rae_decoder": rae,
    "rae_autoencoder": rae,
    "dinosae": autoencoder,
    "lightningdit": transformer,
    "rae_lightningdit": transformer,
    "rae_ditdh": transformer,
}
