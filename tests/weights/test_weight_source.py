"""Where weights come from: what a flow takes from its autoencoder, what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from dinosae_jax import config as config_lib
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.weights import weight_source
from tests.hostile import test_artefacts
from tests.tiny import small_flow
from tests.weights_conversion.layouts import save
from weights_conversion import convert

MODEL = {
    "stem": {"embed_dim": 128, "widths": [8, 16, 32]},
    "vit": {"embed_dim": 128, "depth": 3, "num_heads": 2, "scan_layers": False},
    "decoder": {"latent_channels": 128},
    "pixel_range": "unit",
}
OURS = LatentConvention(tokens=16, width=128, radius=3.0)


def recorded(folder, image_size=64):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model": MODEL, "data": {"image_size": image_size}})
    )
    return str(folder)


def exported(folder):
    arrays = {"vit": {"params": {"a": np.ones((2, 3), np.float32)}}}
    convention = dataclasses.replace(OURS, radius=1.0).to_dict()
    source = weight_source.WeightSource(arrays, MODEL, convention, [], folder)
    weight_source.export(source, folder / "export", ("vit",))
    return str(folder / "export")


@pytest.mark.parametrize("form", ["workdir", "export"])
def test_a_flow_takes_the_model_from_its_autoencoder(tmp_path, form):
    path = recorded(tmp_path / "run") if form == "workdir" else exported(tmp_path)
    config = small_flow(init_from=path)
    lines = weight_source.adopt_model(config, ())
    assert config.model.vit.embed_dim == config.model.stem.embed_dim == 128
    assert config.model.decoder.latent_channels == config.model.dit.in_channels == 128
    assert config.model.vit.depth == 3 and config.model.pixel_range == "unit"
    assert (config.data.image_size, config.model.dit.input_size) == (64, 4)
    assert "model.vit.embed_dim: 64 -> 128" in lines
    assert not any("scan_layers" in line for line in lines)
    config_lib.to_json(config)
    assert weight_source.adopt_model(config, ()) == []


def test_what_was_set_by_hand_stays(tmp_path):
    config = small_flow(init_from=recorded(tmp_path / "run"))
    before = config.model.vit.depth
    lines = weight_source.adopt_model(config, ("model.vit.depth", "model.decoder"))
    assert config.model.vit.depth == before != 3
    assert config.model.decoder.latent_channels != 128
    assert not any(line.startswith(("model.vit.depth", "model.decoder")) for line in lines)


def test_a_flow_takes_what_a_conversion_shows(tmp_path):
    source = save(tmp_path / "a.safetensors", test_artefacts.FACEBOOK)
    convert.convert_file("dinov3", [source], tmp_path / "out")
    config = small_flow(init_from=str(tmp_path / "out"))
    side = config.data.image_size
    weight_source.adopt_model(config, ())
    assert (config.model.vit.depth, config.model.vit.num_heads) == (2, 4)
    assert config.data.image_size == side


def test_nothing_to_take_the_model_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights come from a stage's workdir"):
        weight_source.adopt_model(small_flow(init_from=str(tmp_path / "none")), ())


@pytest.mark.parametrize(
    ("file", "record", "got"),
    [
        ("config.json", {"model": [1]}, "'data'; got None"),
        ("config.json", {"model": [1], "data": {"image_size": "x"}}, r"'model'; got \[1\]"),
        ("config.json", {"model": {"vit": 3}, "data": {}}, "'vit'; got 3"),
        ("export.json", {"model": {}}, "'convention'; got None"),
        ("export.json", {"convention": {"tokens": -4}}, "'model'; got None"),
    ],
)
def test_a_record_of_another_form_is_one_line(tmp_path, file, record, got):
    (tmp_path / file).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"a group of fields {got} in {tmp_path}; take"):
        weight_source.adopt_model(small_flow(init_from=str(tmp_path)), ())


def test_the_radius_is_the_flows_own(tmp_path):
    source = weight_source.open_weights(exported(tmp_path))
    weight_source.check_agreement(source, MODEL, OURS, ("vit",))
    with pytest.raises(ValueError, match=r"radius 3\.0 != 1\.0"):
        weight_source.check_agreement(source, MODEL, OURS, ("vit", "dit"))
    other = dataclasses.replace(OURS, tokens=64)
    with pytest.raises(ValueError, match="tokens 64 != 16"):
        weight_source.check_agreement(source, MODEL, other, ("vit",))


def test_weights_that_init_from_makes_ineffective_are_refused(tmp_path):
    file = save(tmp_path / "a.safetensors", test_artefacts.FACEBOOK)
    convert.convert_file("dinov3", [file], tmp_path / "out")
    source = weight_source.open_weights(tmp_path / "out")
    used, model = source.variables["vit"], source.model
    weight_source.check_effective("vit", str(tmp_path / "out"), used, "runs/stage1", model)
    used["params"]["norm"]["scale"] = used["params"]["norm"]["scale"] + 1
    with pytest.raises(
        ValueError, match=r"got weights\.vit=.* too, which .* leave out --config\.w"
    ):
        weight_source.check_effective("vit", str(tmp_path / "out"), used, "runs/stage1", model)


def test_a_relative_path_is_as_good_as_an_absolute_one(flow_workdir, monkeypatch):
    monkeypatch.chdir(flow_workdir.parent)
    source = weight_source.open_weights(flow_workdir.name)
    assert {"dit", "decoder", "stem", "vit"} == set(source.variables)
