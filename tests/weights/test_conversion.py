"""Reading converted weights: masks, dtypes, and what is refused."""

import json

import numpy as np
import pytest

from dinosae_jax.weights import conversion
from tests.weights_conversion.layouts import save
from weights_conversion.convert import convert_file
from weights_conversion.verification.golden import read_golden


@pytest.fixture
def state(data_dir):
    return dict(read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights)


def convert(tmp_path, state):
    save(tmp_path / "a.safetensors", state)
    convert_file("dinosae", [tmp_path / "a.safetensors"], tmp_path / "out")
    return tmp_path / "out"


def test_roles_and_configuration(tmp_path, state):
    directory = convert(tmp_path, state)
    loaded = conversion.load(directory)
    assert set(loaded.variables) == set(loaded.config) == {"stem", "vit", "decoder"}
    assert loaded.config["vit"]["num_heads"] == 2
    assert loaded.config["decoder"]["depth_list"] == [1, 1, 1, 1, 1]
    kernel = loaded.params["vit"]["patch_embed"]["proj"]["kernel"]
    source = state["TEACHER_ONLY.patch_embed.proj.weight"]
    np.testing.assert_array_equal(kernel, source.transpose(2, 3, 1, 0))
    assert set(conversion.load(directory, ["stem"]).variables) == {"stem"}
    with pytest.raises(
        ValueError, match=r"the roles dit are wanted; got .* holds the roles stem, vit, decoder;"
    ):
        conversion.load(directory, ["dit"])


def test_the_official_file_has_no_teacher_patches(tmp_path, state):
    state = {key: value for key, value in state.items() if not key.startswith("TEACHER_ONLY")}
    directory = convert(tmp_path, state)
    assert "patch_embed" not in conversion.load(directory).params["vit"]
    absent = conversion.read_metadata(directory)["absent"]
    assert absent == [f"vit/params/patch_embed/proj/{leaf}" for leaf in ("bias", "kernel")]


@pytest.mark.parametrize("mask", ["stored", "nan", "absent"])
def test_the_key_bias_is_masked(tmp_path, state, mask):
    keys = [key for key in state if key.endswith("bias_mask")]
    for key in keys:
        if mask == "absent":
            del state[key]
        elif mask == "nan":
            state[key] = np.full_like(state[key], np.nan)
    directory = convert(tmp_path, state)
    bias = conversion.load(directory).params["vit"]["blocks"]["attn"]["qkv"]["bias"]
    for i in range(2):
        source = state[f"dino_model.blocks.{i}.attn.qkv.bias"]
        assert source[32:64].any()
        assert not bias[i, 32:64].any()
        np.testing.assert_array_equal(bias[i, :32], source[:32])
        np.testing.assert_array_equal(bias[i, 64:], source[64:])


def test_a_stored_mask_is_obeyed(tmp_path, state):
    key = "dino_model.blocks.1.attn.qkv.bias_mask"
    state[key] = np.zeros_like(state[key])
    bias = conversion.load(convert(tmp_path, state)).params["vit"]["blocks"]["attn"]["qkv"]["bias"]
    assert bias[0].any() and not bias[1].any()


def test_other_directories_are_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"weights_conversion\.convert --kind"):
        conversion.load(tmp_path)
    directory = convert(tmp_path, state)
    path = directory / conversion.METADATA_FILE
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "format_version": 99}))
    with pytest.raises(ValueError, match="reads format version 1; got format version 99"):
        conversion.load(directory)
    assert conversion.is_conversion(directory) and not conversion.is_conversion(tmp_path)
