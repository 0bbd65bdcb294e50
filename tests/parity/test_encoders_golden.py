"""The encoders and RAE's autoencoder against recorded outputs of their references.

The recordings are not in the repository: DINOSAE_GOLDEN names their folder.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dinosae_jax.encoders import FAMILIES
from dinosae_jax.models import preprocessing, resize, vit_decoder
from dinosae_jax.models.vit import VisionTransformer
from weights_conversion import verify
from weights_conversion.verification.golden import nchw, nhwc, read_golden

MODELS = {
    "encoders/a_dinov2": "dinov2",
    "encoders/a_dinov2_hf5": "dinov2",
    "encoders/a_dinov2_native": "dinov2",
    "encoders/b_dinov2reg_mlp": "dinov2",
    "encoders/b_dinov2reg_mlp_hf5": "dinov2",
    "encoders/b_dinov2reg_swiglu": "dinov2",
    "encoders/b_dinov2reg_swiglu_hf5": "dinov2",
    "encoders/c_siglip": "siglip2",
    "encoders/c_siglip_hf5": "siglip2",
    "encoders/d_mae": "mae",
    "encoders/d_mae_hf5": "mae",
    "encoders/e_eupe": "eupe",
    "encoders/h_dinov2_hub_noreg": "dinov2",
    "encoders/h_dinov2_hub_reg": "dinov2",
    "rae/a_decoder": "rae_decoder",
    "rae/a_decoder_2x": "rae_decoder",
    "rae/a_decoder_2x_rae_keys": "rae_decoder",
    "rae/a_decoder_g16": "rae_decoder",
    "rae/a_decoder_g16_rae_keys": "rae_decoder",
    "rae/a_decoder_rae_keys": "rae_decoder",
    "rae/b_autoencoder_dinov2": "rae_autoencoder",
    "rae/b_autoencoder_dinov2_prev5": "rae_autoencoder",
}
TABLES = {
    "hf_dinov2": ("table37", "bicubic"),
    "hf_dinov2reg": ("table37", "bicubic_antialias"),
    "hf_mae14": ("table14", "bicubic"),
    "hub_noreg": ("table37", "bicubic_offset"),
    "hub_reg": ("table37", "bicubic_antialias"),
    "timm": ("table37", "bicubic_antialias"),
    "timm_noprefix8": ("table8_noprefix", "bicubic_antialias"),
}


def check(got, want, name):
    """Within 2e-5 * max(1, largest value)."""
    assert got.shape == want.shape, name
    error = float(np.abs(np.asarray(got) - want).max())
    assert error <= 2e-5 * max(1.0, float(np.abs(want).max())), (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_model(golden_dir, name):
    lines, good = verify.verify(MODELS[name], read_golden(golden_dir / f"{name}.safetensors"))
    assert good, [line for line in lines if not line.startswith("ok")]


def test_resized_tables_of_positions(golden_dir):
    tensors = load_file(golden_dir / "encoders" / "f_pos_resize.safetensors")
    outputs = {k.removeprefix("output."): v for k, v in tensors.items() if k.startswith("output.")}
    for name, want in outputs.items():
        rule, size = name.split(".")
        height, width = map(int, size.split("x"))
        table, method = TABLES[rule]
        rows = tensors[f"input.{table}"][0]
        count = 0 if "noprefix" in table else 1
        side = round((len(rows) - count) ** 0.5)
        square = jnp.asarray(rows[count:]).reshape(side, side, -1)
        got = resize.resize_table(square, (height, width), method)
        check(got.reshape(1, height * width, -1), want[:, count:], name)


def test_preprocessed_images(golden_dir):
    tensors = load_file(golden_dir / "encoders" / "g_preprocess.safetensors")
    outputs = {k.removeprefix("output."): v for k, v in tensors.items() if k.startswith("output.")}
    assert len(outputs) == 9
    for name, want in outputs.items():
        recipe, image, side = name.split(".")
        family = FAMILIES[recipe.removesuffix("_preprocess_only")]
        pixels = jnp.asarray(nhwc(tensors[f"input.{image}"]), jnp.float32) / 255
        if (recipe, image) == ("raev2_dinov3", "dark"):
            pixels = pixels * 255  # RAEv2's encode takes such an image for one in [0, 1]
        size = (int(side),) * 2
        if recipe.startswith("raev2") and not recipe.endswith("only") and image != "img":
            pixels = resize.resize(pixels, size, "bicubic")  # to its own resolution first
        check(nchw(preprocessing.fit(pixels, family.preprocessing, size)), want, name)


@pytest.mark.parametrize("name", ["e_klayer_dinov3", "e_klayer_c_dinov3_mlp"])
def test_latents_of_several_layers(golden_dir, name):
    golden = read_golden(golden_dir / "rae" / f"{name}.safetensors")
    built, variables = verify.variables_of(
        "dinov3", golden.weights, {"vit": {"num_heads": golden.config["config"]["num_heads"]}}
    )
    reading = dict(FAMILIES["raev2_dinov3"].vit)
    several = built["vit"].clone(**reading, layers=tuple(golden.config["layers"]))
    one = built["vit"].clone(**reading | {"token_mean": False})

    def tokens(module, images):
        patches = module.apply(variables["vit"], images, method=VisionTransformer.embed_patches)
        return module.apply(variables["vit"], patches).patches

    for image in (key for key in golden.inputs if key in ("sq", "ns")):
        x = nhwc(golden.inputs[image])
        check(tokens(several, x), golden.outputs[f"{image}.klayer"], image)
        check(tokens(one, x), golden.outputs[f"{image}.k1_single_layer"], image)
    raw = jnp.asarray(nhwc(golden.inputs["raw"]), jnp.float32) / 255
    small = resize.resize(raw, (64, 64), "bicubic")
    found = tokens(
        several, preprocessing.fit(small, FAMILIES["raev2_dinov3"].preprocessing, (64, 64))
    )
    statistics = {
        "mean": golden.inputs["latent_mean"],
        "variance": golden.inputs["latent_var"],
    }
    normal = vit_decoder.standardise(statistics, found)
    for key, value in (("latent_unnormalised", found), ("latent", normal)):
        check(nchw(value.reshape(-1, 4, 4, 64)), golden.outputs[f"raw.{key}"], key)
