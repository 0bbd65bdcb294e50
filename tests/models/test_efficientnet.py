"""EfficientNet-Lite0 against the same network written on the checkpoint's keys, and on real photos.

`DINOSAE_EFFICIENTNET` names a folder that `weights_conversion.convert --kind=efficientnet_lite0`
wrote from the published weights.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dinosae_jax.data import photos
from dinosae_jax.models.efficientnet import EfficientNetLite0, preprocess
from dinosae_jax.weights import conversion
from tests.models.metrics_weights import (
    EFFICIENTNET_BLOCKS,
    efficientnet_state,
    flax_variables,
    relative_error,
)

# ImageNet-1k's tabby, tiger cat and Egyptian cat; espresso; daisy.
CLASSES = {"chelsea": {281, 282, 285}, "coffee": {967}, "flower": {985}}


@pytest.fixture(scope="module")
def state():
    return efficientnet_state()


def without_counters(state):
    return {key: value for key, value in state.items() if value.dtype == np.float32}


def reference(state, x):
    """(pooled, logits) of x [b,3,224,224]: torch's layout and keys, XLA's own SAME padding."""

    def convolve(x, name, stride=1):
        kernel = state[f"{name}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", feature_group_count=groups, precision="highest"
        )

    def normalise(x, name):
        scale, bias, mean, variance = (
            state[f"{name}.{leaf}"][:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / jnp.sqrt(variance + 1e-3) * scale + bias

    def active(x, conv, norm, stride=1):
        return jnp.clip(normalise(convolve(x, conv, stride), norm), 0.0, 6.0)

    x = active(x, "_conv_stem", "_bn0", 2)
    for i, (_, _, stride, *_) in enumerate(EFFICIENTNET_BLOCKS):
        block, h = f"_blocks.{i}", x
        if f"{block}._expand_conv.weight" in state:
            h = active(h, f"{block}._expand_conv", f"{block}._bn0")
        h = active(h, f"{block}._depthwise_conv", f"{block}._bn1", stride)
        h = normalise(convolve(h, f"{block}._project_conv"), f"{block}._bn2")
        x = x + h if stride == 1 and x.shape[1] == h.shape[1] else h
    pooled = active(x, "_conv_head", "_bn1").mean((2, 3))
    return pooled, pooled @ state["_fc.weight"].T + state["_fc.bias"]


def test_both_taps_equal_the_network_on_the_checkpoints_keys(state):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3)).astype(np.uint8)
    plain = without_counters(state)
    taps = jax.jit(EfficientNetLite0().apply)(flax_variables(plain), images)
    assert {tap: (leaf.shape, leaf.dtype) for tap, leaf in taps.items()} == {
        "pool": ((2, 1280), jnp.float32),
        "logits": ((2, 1000), jnp.float32),
    }
    pixels = preprocess(jnp.asarray(images)).transpose(0, 3, 1, 2)
    pooled, logits = jax.jit(reference)(plain, pixels)
    assert float(jnp.std(pooled)) > 0.1  # weights that let something through
    assert relative_error(taps["pool"], pooled) < 1e-5
    assert relative_error(taps["logits"], logits) < 1e-5


def test_initial_variables_have_the_checkpoints_tree(state):
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    created = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), images)
    expected = flax_variables(without_counters(state))
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(np.shape, expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(created["params"])) == 4_652_008


def test_images_are_resized_and_scaled():
    images = np.stack([np.zeros((9, 5, 3)), np.full((9, 5, 3), 255)]).astype(np.uint8)
    pixels = preprocess(jnp.asarray(images))
    assert pixels.shape == (2, 224, 224, 3)
    np.testing.assert_allclose(pixels[0], -127 / 128, atol=1e-6)
    np.testing.assert_allclose(pixels[1], 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="takes uint8 images; got float32"):
        preprocess(jnp.zeros((1, 8, 8, 3)))


def test_published_weights_know_the_photos():
    folder = os.environ.get("DINOSAE_EFFICIENTNET")
    if not folder:
        pytest.skip("DINOSAE_EFFICIENTNET is not set: there are no published weights to ask")
    variables = conversion.load(folder, ("efficientnet",)).variables["efficientnet"]
    classify = jax.jit(lambda v, x: EfficientNetLite0().apply(v, x)["logits"])
    for name, expected in CLASSES.items():
        photo = np.asarray(Image.open(photos.photo_path(name)).convert("RGB"))
        odds = jax.nn.softmax(classify(variables, photo[None])[0])
        best = np.argsort(-odds)[: len(expected)]
        print(f"{name}: " + ", ".join(f"{i} ({odds[i]:.2f})" for i in best))
        assert set(best.tolist()) == expected
