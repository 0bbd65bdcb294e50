"""FID Inception against recorded features of torch-fidelity and pytorch-fid."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.inception import InceptionFID, preprocess, resize_half_pixel, resize_tf1
from tests.models.metrics_weights import flax_variables, relative_error, seeded_state

TOLERANCE = 1e-4  # float32 features against those recorded from torch-fidelity and pytorch-fid
TAPS = {
    "64": "tf_64", "192": "tf_192", "768": "tf_768", "2048": "tf_2048", "logits": "tf_logits",
    "logits_unbiased": "tf_logits_unbiased", "spatial": "tf_spatial_nhwc7",
}  # fmt: skip


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "inception_fullshape.npz")


@pytest.fixture(scope="module")
def variables(recording):
    kinds = {
        "conv.weight": 2.0, "bn.weight": "scale", "bn.bias": "shift", "fc.weight": 1.0,
        "fc.bias": "bias", "bn.running_mean": "shift", "bn.running_var": "variance",
    }  # fmt: skip
    kind_of = lambda name: kinds[".".join(name.split(".")[-2:])]  # noqa: E731
    state = seeded_state(recording["keys"], recording["shapes"], kind_of, recording["crc"])
    return flax_variables(state)


def check_features(recording, case, variables):
    taps = jax.jit(InceptionFID().apply)(variables, recording[f"{case}/img_u8"])
    for tap, name in TAPS.items():
        assert relative_error(taps[tap], recording[f"{case}/{name}"]) < TOLERANCE, tap


def check_resizes(recording, case):
    images = recording[f"{case}/img_u8"].astype(np.float32)
    for resize, name in ((resize_tf1, "tf1"), (resize_half_pixel, "halfpixel")):
        crop = jax.jit(resize)(images)[:, :40, :40].transpose(0, 3, 1, 2)
        assert relative_error(crop, recording[f"{case}/resize_{name}_crop"]) < 1e-6, name


def test_features_equal_recorded(recording, variables):
    check_features(recording, "a", variables)


@pytest.mark.slow
def test_features_of_a_large_image_equal_recorded(golden_dir, variables):
    check_features(np.load(golden_dir / "metrics/inception_fullshape.npz"), "b", variables)


@pytest.mark.slow
def test_pytorch_fid_features_equal_recorded(golden_dir, variables):
    recording = np.load(golden_dir / "metrics/inception_fullshape.npz")
    extract = jax.jit(lambda v, x: InceptionFID("pytorch_fid").apply(v, x)["2048"])
    for case in "ab":
        features = extract(variables, recording[f"{case}/img_u8"])
        assert relative_error(features, recording[f"{case}/ptfid_2048"]) < TOLERANCE


def test_resizes_equal_recorded(recording):
    check_resizes(recording, "a")


def test_resizes_of_a_large_image_equal_recorded(golden_dir):
    check_resizes(np.load(golden_dir / "metrics/inception_fullshape.npz"), "b")


def test_resize_tf1_by_hand():
    row = jnp.array([0.0, 10.0, 40.0]).reshape(1, 1, 3, 1)
    expected = [0, 5, 10, 25, 40, 40]  # positions 0, 0.5, ..., 2.5; the last pixel repeats
    resized = resize_tf1(row, side=6)
    np.testing.assert_allclose(resized[0, :, :, 0], np.tile(expected, (6, 1)), atol=1e-5)


@pytest.mark.parametrize("pipeline, white", [("tf1", 127 / 128), ("pytorch_fid", 1.0)])
def test_scaling_of_the_pipelines(pipeline, white):
    images = np.stack([np.zeros((9, 5, 3)), np.full((9, 5, 3), 255)]).astype(np.uint8)
    pixels = preprocess(jnp.asarray(images), pipeline)
    np.testing.assert_allclose(pixels[0], -1.0, atol=1e-6)
    np.testing.assert_allclose(pixels[1], white, atol=1e-6)


def test_initial_variables_have_the_recorded_tree(recording):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    created = jax.eval_shape(InceptionFID().init, jax.random.key(0), images)
    state = {
        str(name): np.broadcast_to(np.float32(0), ast.literal_eval(str(shape)))
        for name, shape in zip(recording["keys"], recording["shapes"], strict=True)
    }
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(np.shape, flax_variables(state))
    assert sum(leaf.size for leaf in jax.tree.leaves(created["params"])) == 23_850_960


def test_float_images_and_unknown_pipelines_are_refused():
    with pytest.raises(ValueError, match="takes uint8 images; got float32"):
        preprocess(jnp.zeros((1, 8, 8, 3)), "tf1")
    with pytest.raises(ValueError, match="'tf1' or 'pytorch_fid'; got 'tf2'"):
        preprocess(jnp.zeros((1, 8, 8, 3), jnp.uint8), "tf2")
