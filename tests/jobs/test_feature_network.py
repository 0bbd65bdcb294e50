"""Which network's features the jobs measure in, from the folders that a config names."""

import types

import ml_collections
import numpy as np
import pytest

from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import inputs
from dinosae_jax.runtime import sharding
from tests.models.metrics_weights import efficientnet_state
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_zip import write_torch
from weights_conversion import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders `a` and `b` of the same weights, from files of two formats."""
    folder = tmp_path_factory.mktemp("efficientnet")
    state = efficientnet_state()
    files = (save(folder / "a.safetensors", state), write_torch(folder / "b.pth", state))
    for file in files:
        convert.convert_file("efficientnet_lite0", [file], folder / file.stem)
    return folder


def given(**folders):
    named = {role: str(folder) for role, folder in folders.items()}
    return ml_collections.ConfigDict({"inception": "", "efficientnet": "", **named})


def no_encoder():
    raise AssertionError("the encoder was opened")


@pytest.mark.slow
def test_efficientnet_is_known_by_its_weights_whatever_file_they_came_in(converted):
    mesh = sharding.make_mesh()
    networks = [
        inputs.feature_network(given(efficientnet=converted / name), mesh, no_encoder)
        for name in "ab"
    ]
    first, second = (network.recipe("pool", resolution=64) for network in networks)
    assert first == second
    assert (first.network, len(first.network_sha256)) == ("efficientnet_lite0", 64)
    fc = networks[0].variables["params"]["_fc"]["kernel"]
    np.testing.assert_array_equal(fc, efficientnet_state()["_fc.weight"].T)


def test_inception_comes_first_and_the_encoder_last(monkeypatch):
    loaded = []

    def load(folder, roles):
        loaded.append((folder, *roles))
        variables = {role: {"params": {}} for role in roles}
        return types.SimpleNamespace(
            variables=variables, metadata={"files": [{"sha256": "6726825d"}]}
        )

    monkeypatch.setattr(inputs, "conversion", types.SimpleNamespace(load=load))
    mesh = sharding.make_mesh()
    both = given(inception="i", efficientnet="e")
    network = inputs.feature_network(both, mesh, no_encoder, "half_pixel_bilinear")
    assert loaded == [("i", "inception")]
    assert (network.name, network.sha256) == ("inception_fid", "6726825d")
    assert network.resize == "half_pixel_bilinear"
    autoencoder = types.SimpleNamespace(modules="m", variables={"stem": {}, "vit": {}})
    monkeypatch.setattr(features, "encoder", lambda *about: about)
    found = inputs.feature_network(given(), mesh, lambda: autoencoder)
    assert found[:2] == ("m", autoencoder.variables)
    assert len(loaded) == 1


def test_weights_of_another_network_are_refused(converted):
    with pytest.raises(
        ValueError, match=r"roles inception are wanted; got .* holds the roles efficientnet"
    ):
        inputs.pretrained_weights(given(inception=converted / "a"))
