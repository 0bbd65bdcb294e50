"""The other encoders and RAE: every published layout there and back, and one tree for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax import encoders, licences
from dinosae_jax.models import registry
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.weights import conversion
from tests.weights_conversion import encoder_states as states
from tests.weights_conversion.layouts import save
from tests.weights_conversion.test_convert import assert_round_trip
from weights_conversion import convert

DINOV2 = states.facebook()
GIANT = states.facebook(gated=True)
MAE = states.facebook(registers=0, scales=False, patch=16, mask=False)
SIGLIP = {k: v for k, v in MAE.items() if k != "cls_token"} | {
    "pos_embed": np.ascontiguousarray(MAE["pos_embed"][:, 1:])
}
SWIGLU_5 = states.renamed(GIANT, states.TOP, states.DINOV2_5, "encoder.layer")
LAYOUTS = {
    ("dinov2", "facebook"): DINOV2,
    ("dinov2", "huggingface"): states.renamed(DINOV2, states.TOP, states.DINOV2, "encoder.layer"),
    ("dinov2", "huggingface_5"): states.renamed(
        DINOV2, states.TOP, states.DINOV2_5, "encoder.layer"
    ),
    ("dinov2", "timm"): states.timm_registers(DINOV2),
    ("siglip2", "timm"): SIGLIP,
    ("siglip2", "huggingface"): states.renamed(
        SIGLIP, states.SIGLIP_TOP, states.SIGLIP, "encoder.layers"
    ),
    ("mae", "facebook"): MAE,
    ("mae", "huggingface"): states.renamed(MAE, states.TOP, states.MAE, "encoder.layer", "vit."),
    ("mae", "huggingface_5"): states.renamed(MAE, states.TOP, states.MAE_5, "layers", "vit."),
}


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_layouts_round_trip(tmp_path, kind, layout):
    state = LAYOUTS[kind, layout]
    source = save(tmp_path / "a.safetensors", state)
    metadata = assert_round_trip(tmp_path, kind, source, state)
    assert metadata["layout"] == layout
    assert metadata["model"] == {"encoder": kind}
    plain = conversion.load(tmp_path / "out").variables["vit"]
    reference = tmp_path / "plain.safetensors"
    save(reference, LAYOUTS[kind, "timm" if kind == "siglip2" else "facebook"])
    convert.convert_file(kind, [reference], tmp_path / "plain")
    wanted = conversion.load(tmp_path / "plain").variables["vit"]
    if layout == "timm" and kind == "dinov2":
        wanted["params"]["pos_embed"] = wanted["params"]["pos_embed"][:, 1:]
        wanted["params"]["mask_token"] = 0 * wanted["params"]["mask_token"]
    jax.tree.map(np.testing.assert_array_equal, plain, wanted)


def test_the_gated_network_round_trips_in_all_names(tmp_path):
    trees = []
    for number, names in enumerate((None, states.DINOV2, states.DINOV2_5)):
        other = (
            GIANT if names is None else states.renamed(GIANT, states.TOP, names, "encoder.layer")
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        source = save(folder / "a.safetensors", other)
        metadata = assert_round_trip(folder, "dinov2", source, other)
        assert metadata["config"]["vit"]["ffn_layer"] == "swiglu_fused"
        assert metadata["config"]["vit"]["ffn_hidden"] == states.HIDDEN
        trees.append(conversion.load(folder / "out").variables["vit"])
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])


def test_key_biases_that_are_not_masked_stay(tmp_path):
    source = save(tmp_path / "a.safetensors", DINOV2)
    convert.convert_file("dinov2", [source], tmp_path / "out")
    bias = conversion.load(tmp_path / "out").params["vit"]["blocks"]["attn"]["qkv"]["bias"]
    np.testing.assert_array_equal(bias[1], DINOV2["blocks.1.attn.qkv.bias"])


@pytest.mark.parametrize("network", encoders.NETWORKS)
def test_published_sizes_have_the_published_parameters(network):
    name, size = encoders.NETWORKS[network]
    known = {
        "dinov2_vits14_reg": 22_058_112,
        "dinov2_vitb14_reg": 86_583_552,
        "dinov2_vitl14_reg": 304_372_736,
        "webssl_300m": 303_228_928,
        "mae_vitb16": 85_798_656,
    }
    module = VisionTransformer(**{**encoders.FAMILIES[name].vit, **size})
    assert module.patch_size == int("14" in network or network == "webssl_300m") * -2 + 16
    if network in known:
        shapes = jax.eval_shape(
            module.init, jax.random.key(0), jnp.zeros((1, 2, 2, module.embed_dim))
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        unused = module.embed_dim if name == "mae" else 0  # a mask token that MAE's file lacks
        assert count - unused == known[network]


def test_rae_in_three_files_and_in_one_is_one_autoencoder(tmp_path):
    paths = [
        save(tmp_path / f"{name}.safetensors", state)
        for name, state in zip(("encoder", "decoder", "stat"), states.rae_files(), strict=True)
    ]
    convert.convert_file("rae_autoencoder", paths, tmp_path / "three")
    state = states.diffusers()
    source = save(tmp_path / "one.safetensors", state)
    metadata = assert_round_trip(tmp_path, "rae_autoencoder", source, state)
    assert metadata["model"] == {"encoder": "rae_dinov2", "pixel_range": "imagenet"}
    assert metadata["derived"] == ["decoder/params/pos_embed"]
    three, one = (conversion.load(tmp_path / name) for name in ("three", "out"))
    assert one.config["decoder"] == three.config["decoder"] | {"statistics": "deviation"}
    assert one.config["vit"] == three.config["vit"]
    assert one.config["vit"]["final_norm"] == "plain"
    for role in ("stem", "vit"):
        own = dict(three.variables[role]["params"])
        jax.tree.map(np.testing.assert_array_equal, own, one.variables[role]["params"])
    np.testing.assert_array_equal(
        one.variables["stem"]["params"]["proj"]["kernel"],
        one.variables["vit"]["params"]["patch_embed"]["proj"]["kernel"],
    )


def refusal(tmp_path, kind, *given):
    paths = [save(tmp_path / f"{i}.safetensors", state) for i, state in enumerate(given)]
    with pytest.raises(ValueError) as error:
        convert.convert_file(kind, paths, tmp_path / "out")
    return str(error.value)


def test_files_of_another_encoder_or_autoencoder_are_refused(tmp_path):
    encoder, decoder, statistics = states.rae_files()
    ragged = DINOV2 | {"pos_embed": DINOV2["pos_embed"][:, :6]}
    assert "has a square grid; got 6 rows" in refusal(tmp_path, "dinov2", ragged)
    hugging = LAYOUTS["dinov2", "huggingface"]
    for kind in ("siglip2", "mae"):
        message = refusal(tmp_path, kind, hugging)
        assert message.startswith(f"a {kind} state dict has no LayerScale; got one with it")
    message = refusal(tmp_path, "dinov2", MAE)
    assert message.startswith("a dinov2 state dict has LayerScale; got one without")
    other = {k: np.concatenate([v, v]) for k, v in statistics.items()}
    message = refusal(tmp_path, "rae_autoencoder", encoder, decoder, other)
    assert message.startswith("statistics of latents have the decoder's channels, 32; got (64, 2")
    assert "give its file too" in refusal(tmp_path, "rae_autoencoder", decoder, statistics)
    foreign = states.diffusers()
    foreign["encoder_mean"] = np.full((1, 3, 1, 1), 0.5, np.float32)
    message = refusal(tmp_path, "rae_autoencoder", foreign)
    assert "rae_dinov2 does, with encoder_mean" in message
    assert "\n" not in message


def test_the_manifest_names_every_licence(tmp_path):
    for kind in ("dinov2", "mae", "siglip2"):
        state = LAYOUTS[kind, "huggingface"]
        if kind == "dinov2":  # the published table
            table = np.zeros((1, 37**2 + 1, states.WIDTH), np.float32)
            state = state | {"embeddings.position_embeddings": table}
        source = save(tmp_path / f"{kind}.safetensors", state)
        metadata = convert.convert_file(kind, [source], tmp_path / kind)
        entry = licences.entries(metadata)["vit"]
        assert entry["licence"] == "Apache-2.0"
        assert entry["files"][0]["sha256"] == metadata["files"][0]["sha256"]
        licences.require_permissive({"vit": entry})
    bound = licences.entries({"kind": "dinov3", "layout": "", "files": [], "config": {"vit": {}}})
    with pytest.raises(ValueError, match="got vit of facebookresearch/dinov3, DINOv3 License"):
        licences.require_permissive(bound)


def test_every_kind_has_terms():
    from weights_conversion import tables

    assert {k for k in tables.KINDS if not k.startswith("dinosae_")} <= set(licences.TERMS)


def test_a_converted_decoder_can_be_built(tmp_path):
    source = save(tmp_path / "a.safetensors", states.diffusers())
    convert.convert_file("rae_decoder", [source], tmp_path / "out")
    loaded = conversion.load(tmp_path / "out")
    module = registry.build("decoder", loaded.config["decoder"])
    image = module.apply(loaded.variables["decoder"], jnp.zeros((1, 2, 2, states.WIDTH)))
    assert image.shape == (1, 32, 32, 3)
