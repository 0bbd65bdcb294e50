"""DINO v1 trunk against recorded activations of the reference implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.dino_v1 import DinoV1, preprocess
from dinosae_jax.sizes import DINO
from tests.models.metrics_weights import (
    flax_variables,
    group,
    relative_error,
    seeded_state,
    stack_blocks,
)

TINY = {
    "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
    "key_depths": (0, 1, 3),
}  # fmt: skip
TOLERANCE = 2e-5  # float32 against activations recorded from RAE


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "disc_tiny.npz")


@pytest.fixture(scope="module")
def params(recording):
    return stack_blocks(flax_variables(group(recording, "backbone/"))["params"])


@pytest.mark.parametrize("options", [{}, {"scan_layers": False, "remat": "full"}])
def test_activations_equal_recorded(recording, params, options):
    images = recording["fake"].transpose(0, 2, 3, 1)
    model = DinoV1(**TINY, **options)
    activations = jax.jit(model.apply)({"params": params}, images)
    assert len(activations) == 4
    for i, activation in enumerate(activations):
        expected = recording[f"acts_fake/{i}"].transpose(0, 2, 1)
        assert relative_error(activation, expected) < TOLERANCE
    np.testing.assert_array_equal(activations[0], activations[3])


def test_initial_parameters_have_the_recorded_tree(recording, params):
    model = DinoV1(**TINY)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    created = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    read = {name: leaf for name, leaf in params.items() if name != "norm"}
    assert jax.tree.map(lambda x: x.shape, created) == jax.tree.map(lambda x: x.shape, read)


@pytest.mark.parametrize("side", [224, 112, 300])
def test_preprocess_normalises_any_side(side):
    grey = preprocess(jnp.zeros((1, side, side, 3)))
    expected = (0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert grey.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(grey[0, 100, 100], expected, atol=1e-6)


@pytest.mark.slow  # in the fast suite: of LightningDiT
def test_rematerialisation_keeps_the_gradient(recording, params):
    def gradient(remat):
        model = DinoV1(**TINY, remat=remat)
        loss_fn = lambda x, params: jnp.square(model.apply({"params": params}, x)[1]).mean()  # noqa: E731
        return jax.jit(jax.grad(loss_fn))(recording["fake"].transpose(0, 2, 3, 1), params)

    plain = gradient("none")
    assert np.abs(plain).max() > 0
    for remat in ("dots", "full"):
        assert relative_error(gradient(remat), plain) < 1e-5


def test_bfloat16_is_close_and_returns_float32(recording, params):
    model = DinoV1(**TINY, dtype=jnp.bfloat16)
    activations = jax.jit(model.apply)({"params": params}, recording["fake"].transpose(0, 2, 3, 1))
    for i, activation in enumerate(activations):
        assert activation.dtype == jnp.float32
        expected = recording[f"acts_fake/{i}"].transpose(0, 2, 1)
        assert relative_error(activation, expected) < 0.02  # 8 bits of mantissa, four blocks


@pytest.mark.parametrize("key_depths", [(0, 4), (1, 0), (-1,)])
def test_bad_key_depths_are_refused(key_depths):
    model = DinoV1(**{**TINY, "key_depths": key_depths})
    with pytest.raises(ValueError, match="key_depths must be increasing"):
        model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_parameter_count_of_the_published_sizes():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    counts = {}
    for size, numbers in DINO.items():
        tree = jax.eval_shape(DinoV1(**numbers).init, jax.random.key(0), images)["params"]
        counts[size] = sum(leaf.size for leaf in jax.tree.leaves(tree))
    # ViT-S/16 and ViT-B/16 have 21,665,664 and 85,798,656 with the final norm, which is not here.
    assert counts == {
        "S_8": 21_670_272 - 768,
        "S_16": 21_665_664 - 768,
        "B_16": 85_798_656 - 1536,
    }


def dino_kind(name):
    if name in ("cls_token", "pos_embed"):
        return "token"
    if "norm" in name:
        return "scale" if name.endswith("weight") else "shift"
    return 1.0 if name.endswith("weight") else "bias"


def test_full_size_activations_equal_recorded(golden_dir):
    recording = np.load(golden_dir / "metrics" / "disc_s8_fullshape.npz")
    state = seeded_state(
        recording["backbone_keys"], recording["backbone_shapes"], dino_kind, recording["crc"]
    )
    params = stack_blocks(flax_variables(state)["params"])
    images = recording["img_u8"] / np.float32(127.5) - 1
    activations = jax.jit(DinoV1(**DINO["S_8"]).apply)({"params": params}, images)
    for i, activation in enumerate(activations):
        channels = activation[0, :, :8].T
        assert relative_error(channels, recording["act_checks"][i]) < TOLERANCE
        assert abs(activation.mean() - recording["act_mean"][i]) < TOLERANCE
        assert relative_error(activation.std(ddof=0), recording["act_std"][i]) < 1e-3
