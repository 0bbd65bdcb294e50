"""The export job: what it writes is the autoencoder that the workdir holds, to the bit."""

import json

import jax
import numpy as np
import pytest

from configs import export as export_config
from dinosae_jax import rules
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.jobs import export
from dinosae_jax.runtime import sharding
from dinosae_jax.weights import weight_source
from tests import tiny
from tests.weights_conversion.layouts import save
from weights_conversion.convert import convert_file
from weights_conversion.verification.golden import read_golden


@pytest.fixture(scope="module")
def workdir(stage_workdir):
    return stage_workdir


def make(**changes):
    config = export_config.get_config(changes.pop("argument", None))
    config.update(changes)
    rules.validate(config)
    return config


def test_the_export_is_the_workdir_to_the_bit(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "export"
    export.run(make(init_from=str(workdir)), output)
    assert "wrote stem, vit, decoder to" in capsys.readouterr().out
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    ours, theirs = (Autoencoder.load(place, mesh=mesh) for place in (output, workdir))
    leaves = zip(jax.tree.leaves(ours.variables), jax.tree.leaves(theirs.variables), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    assert (ours.modules, ours.convention) == (theirs.modules, theirs.convention)
    assert ours.notes == theirs.notes
    images = tiny.images(2, 32, 32).astype(np.float32) / 255.0
    np.testing.assert_array_equal(ours.reconstruct(images), theirs.reconstruct(images))


def test_a_folder_in_use_is_refused(workdir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="an export needs an empty folder"):
        export.run(make(init_from=str(workdir)), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_the_export_of_converted_weights_states_their_convention(data_dir, tmp_path):
    state = dict(read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights)
    save(tmp_path / "a.safetensors", state)
    convert_file("dinosae", [tmp_path / "a.safetensors"], tmp_path / "converted")
    config = make(init_from=str(tmp_path / "converted"), pixel_range="symmetric")
    export.run(config, tmp_path / "export")
    source = weight_source.open_weights(tmp_path / "export")
    assert source.model["pixel_range"] == source.convention["pixels"] == "symmetric"
    assert any("a.safetensors" in note for note in source.notes)
    assert Autoencoder.load(tmp_path / "export").modules.pixel_range == "symmetric"


def test_tiny_needs_no_weights(tmp_path):
    config = make(argument="tiny")
    config.random_model.update(tiny.model())
    export.run(config, tmp_path / "export")
    assert (
        "randomly initialised"
        in json.loads((tmp_path / "export" / weight_source.EXPORT_FILE).read_text())["notes"][0]
    )


def test_a_source_is_needed():
    with pytest.raises(ValueError, match="export needs an autoencoder; got an empty init_from"):
        make(init_from="")
    with pytest.raises(ValueError, match="needs an autoencoder"):
        make(init_from="", random_frozen_ok=("stem", "vit"))
