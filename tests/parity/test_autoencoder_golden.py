"""The autoencoder against recorded outputs of the reference implementations.

tests/recordings/autoencoder holds a part of the recordings; with DINOSAE_GOLDEN set, all are swept.
"""

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.rope import default_periods
from dinosae_jax.models.stem import ConvStem
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.sizes import from_dcae
from tests.parity.torch_keys import read, to_flax, under

Pairs = Iterator[tuple[str, jax.Array, np.ndarray]]

COMPACT = ["c_dinov3_mlp", "c_dinov3_swiglu", "e_autoencoder", "f_dcae_original"]
COMPLETE = [
    "a_stem",
    "b1_decoder_resblock",
    "b2_decoder_evit_trms",
    "b3_decoder_evit_bn",
    "b4_decoder_interp",
    "b5_decoder_noshortcut",
    "d_dinov3_mlp_hf",
    "d_dinov3_swiglu_hf",
    *COMPACT,
]


@pytest.mark.parametrize("name", COMPACT)
def test_matches_compact_recordings(data_dir: pathlib.Path, name: str) -> None:
    check_file(data_dir / "autoencoder" / f"{name}.safetensors")


@pytest.mark.parametrize("name", COMPLETE)
def test_matches_complete_recordings(golden_dir: pathlib.Path, name: str) -> None:
    check_file(golden_dir / "autoencoder" / f"{name}.safetensors")


def check_file(path: pathlib.Path) -> None:
    """Every recorded output and intermediate within 2e-5 * max(1, largest value)."""
    cases = {"a": stem_pairs, "b": decoder_pairs, "c": vit_pairs, "d": hf_pairs}
    cases |= {"e": autoencoder_pairs, "f": decoder_pairs}
    outputs = read(path)[2]
    seen = set()
    for name, got, want in cases[path.name[0]](path):
        assert got.shape == want.shape, name
        bound = 2e-5 * max(1.0, float(np.abs(want).max()))
        error = float(np.abs(np.asarray(got) - want).max())
        print(f"{path.stem:24} {name:28} {error:.1e} of {bound:.1e}")
        assert error <= bound, (name, error, bound)
        seen.add(name)
    assert seen == set(outputs)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def nchw(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


def stem_pairs(path: pathlib.Path) -> Pairs:
    params, inputs, outputs, config = read(path)
    stem, variables = ConvStem(config["embed_dim"]), to_flax(params)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    run = jax.jit(functools.partial(stem.apply, **capture))
    for name, image in inputs.items():
        got, state = run(variables, nhwc(image))
        yield name, got, outputs[name]
        for i in range(3) if f"{name}.layer0.out" in outputs else ():
            layer = state["intermediates"][f"cnn_{i}"]
            yield (
                f"{name}.layer{i}.out",
                nchw(layer["__call__"][0]),
                outputs[f"{name}.layer{i}.out"],
            )
            conv = nchw(layer["conv"]["__call__"][0])
            yield f"{name}.layer{i}.conv", conv, outputs[f"{name}.layer{i}.conv"]


def decoder_pairs(path: pathlib.Path) -> Pairs:
    params, inputs, outputs, config = read(path)
    fields = {k: v for k, v in config.items() if k in Decoder.__dataclass_fields__}
    stages = 0
    if path.name.startswith("f"):
        params, fields = under(params, "decoder."), from_dcae(fields)
        stages = len(config["width_list"])
    decoder, variables = Decoder(**fields), to_flax(params, dcae_stages=stages)

    @jax.jit
    def run(z):
        return decoder.apply(variables, z), decoder.apply(variables, z, method=Decoder.trunk)

    for name, z in inputs.items():
        image, trunk = run(nhwc(z))
        yield name, nchw(image), outputs[name]
        for layer in [key for key in trunk if f"{name}.{key}" in outputs]:
            yield f"{name}.{layer}", nchw(trunk[layer]), outputs[f"{name}.{layer}"]


def vit_of(params: dict, config: dict) -> VisionTransformer:
    swiglu = "swiglu" in config["ffn_layer"]
    hidden = "blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight"
    return VisionTransformer(
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        ffn_layer="swiglu" if swiglu else "mlp",
        ffn_hidden=params[hidden].shape[0],
        qkv_bias=config["qkv_bias"],
        num_storage_tokens=config["n_storage_tokens"],
    )


@functools.partial(jax.jit, static_argnums=0)
def run_vit(vit: VisionTransformer, variables: dict, image: jax.Array, mask: jax.Array | None):
    patches = vit.apply(variables, image, method=VisionTransformer.embed_patches)
    return vit.apply(variables, patches, mask, intermediates=True)


def vit_pairs(path: pathlib.Path) -> Pairs:
    params, inputs, outputs, config = read(path)
    vit, variables = vit_of(params, config), to_flax(params)
    for name in [key for key in inputs if not key.startswith("mask_")]:
        out = run_vit(vit, variables, nhwc(inputs[name]), inputs.get(f"mask_{name}"))
        states = out.intermediates
        exposed = {
            "x_norm_clstoken": out.cls,
            "x_storage_tokens": out.storage,
            "x_norm_patchtokens": out.patches,
            "x_prenorm": out.prenorm,
            "tokens_in": states["tokens_in"],
            "rope_sin": states["rope_sin"],
            "rope_cos": states["rope_cos"],
        }
        for i in range(config["depth"]):
            exposed[f"block{i}.after_attn"] = states["after_attn"][i]
            exposed[f"block{i}.out"] = states["out"][i]
        for key, want in under(outputs, f"{name}.").items():
            yield f"{name}.{key}", exposed[key], want


def hf_pairs(path: pathlib.Path) -> Pairs:
    """The same weights as in file c, run with periods in float32."""
    params, _, _, config = read(path.with_name(path.name.replace("d_", "c_").replace("_hf", "")))
    _, inputs, outputs, _ = read(path)
    vit, variables = vit_of(params, config), to_flax(params)
    head_dim = config["embed_dim"] // config["num_heads"]
    variables["params"]["rope_embed"] = {"periods": default_periods(head_dim)}
    for name in [key for key in inputs if not key.startswith("mask_")]:
        out = run_vit(vit, variables, nhwc(inputs[name]), inputs.get(f"mask_{name}"))
        got = jnp.concatenate([out.cls[:, None], out.storage, out.patches], axis=1)
        yield f"{name}.last_hidden_state", got, outputs[f"{name}.last_hidden_state"]


def autoencoder_pairs(path: pathlib.Path) -> Pairs:
    params, inputs, outputs, config = read(path)
    trunk = under(params, "dino_model.")
    stem_keys = under(trunk, "patch_embed.")
    vit_keys = {k: v for k, v in trunk.items() if not k.startswith("patch_embed.")}
    vit = vit_of(vit_keys, config["dino"])
    vit_variables = to_flax({**vit_keys, **under(params, "TEACHER_ONLY.")})
    stem = ConvStem(config["dino"]["embed_dim"])
    decoder = Decoder(**config["decoder"])
    decoder_variables = to_flax(under(params, "decoder."))

    @jax.jit
    def run(image):
        patches = stem.apply(to_flax(stem_keys), image)
        student = vit.apply(vit_variables, patches)
        recon = decoder.apply(decoder_variables, student.patches.reshape(patches.shape))
        return student, nchw(recon)

    for name, image in inputs.items():
        student, recon = run(nhwc(image))
        teacher = run_vit(vit, vit_variables, nhwc(image), None).patches
        lengths = np.linalg.norm(student.patches, axis=-1) * np.linalg.norm(teacher, axis=-1)
        cosine = np.sum(student.patches * teacher, axis=-1) / lengths
        exposed = {
            "patch_tokens": student.patches,
            "cls_token": student.cls,
            "recon": recon,
            "teacher_patch_tokens": teacher,
            "cosine_per_token": cosine,
            "align_loss_mean": np.mean(1 - cosine)[None],
        }
        for key, want in under(outputs, f"{name}.").items():
            yield f"{name}.{key}", exposed[key], want
