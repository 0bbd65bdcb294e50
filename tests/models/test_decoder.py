"""Decoder: building blocks, presets, batch norm, the split at the last layer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import decoder_blocks as blocks
from dinosae_jax.models.decoder import Decoder
from dinosae_jax.models.layers import BatchNorm, PixelRMSNorm
from dinosae_jax.sizes import DECODER, from_dcae

SMALL = dict(latent_channels=8, width_list=(4, 8, 8), depth_list=(1, 1, 1))

PARAMETERS = {
    "A": 103_239_171,
    "A0": 101_493_004,
    "B": 137_818_124,
    "B2": 191_387_660,
    "C": 159_866_371,
    "S": 99_900_547,
    "L": 164_024_076,
    "D": 189_982_476,
}


def shapes_of(config, grid=(2, 2)):
    z = jax.ShapeDtypeStruct((1, *grid, config["latent_channels"]), jnp.float32)
    return jax.eval_shape(Decoder(**config).init, jax.random.key(0), z)


def leaf_paths(tree):
    return {
        "/".join(k.key for k in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def random_variables(config, seed=0):
    """Random parameters, and running statistics of a plausible size."""
    random = np.random.default_rng(seed)
    draw = lambda x: random.uniform(-0.3, 0.3, x.shape).astype(np.float32)  # noqa: E731
    variables = jax.tree.map(draw, shapes_of(config))
    variables["batch_stats"] = jax.tree.map(np.abs, variables.get("batch_stats", {}))
    return variables


def latents(channels, batch=2, grid=(2, 3)):
    shape = (batch, *grid, channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("A0", "B2", "dc-ae-f64c128-1.0"))
        )
        for name in DECODER
    ],
)
def test_presets_build_with_the_reference_parameter_counts(name):
    variables = shapes_of(DECODER[name])
    if name in PARAMETERS:
        sizes = [math.prod(x.shape) for x in jax.tree.leaves(variables["params"])]
        assert sum(sizes) == PARAMETERS[name]
    path = "/".join(Decoder(**DECODER[name]).last_kernel_path)
    assert leaf_paths(variables["params"])[path][-1] in (3, 12)


def test_preset_a_is_what_the_decoder_makes_sixteen_times_larger():
    z = jax.ShapeDtypeStruct((2, 3, 5, 1024), jnp.float32)
    out = jax.eval_shape(Decoder(**DECODER["A"]).init_with_output, jax.random.key(0), z)[0]
    assert (out.shape, out.dtype) == ((2, 48, 80, 3), jnp.float32)


def test_a_shuffled_convolution_has_the_output_channel_slowest():
    """A kernel that copies input channel t to its output channel t shows PyTorch's order."""
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    module = blocks.ConvPixelShuffle(features=2, dtype=jnp.float32)
    kernel = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    bias = jnp.arange(8.0) / 16
    got = module.apply({"params": {"conv": {"conv": {"kernel": kernel, "bias": bias}}}}, x)
    np.testing.assert_array_equal(got[0, :, :, 0], np.asarray([[0, 1], [2, 3]]) * 17 / 16)
    np.testing.assert_array_equal(got[0, :, :, 1], np.asarray([[4, 5], [6, 7]]) * 17 / 16)


@pytest.mark.parametrize(
    ("channels", "features"), [(1, 2), (2, 2), (4, 2), (8, 2), (4, 3), (4, 6), (24, 6), (2, 1)]
)
def test_duplicating_shortcut_takes_channel_4c_2i_j_over_r(channels, features):
    """Sub-pixel (i, j) of output channel c, with r repeats of each input channel."""
    x = jnp.arange(float(channels)).reshape(1, 1, 1, channels)
    got = blocks.Duplicate(features, factor=2).apply({}, x)
    for c in range(features):
        for i in range(2):
            for j in range(2):
                assert got[0, i, j, c] == (4 * c + 2 * i + j) // (4 * features // channels)


def test_a_shuffled_residual_is_the_sum_of_its_parts():
    x = np.random.default_rng(5).normal(size=(2, 3, 5, 8)).astype(np.float32)
    both = blocks.ShuffledResidual(features=4, dtype=jnp.float32)
    variables = both.init(jax.random.key(0), x)
    conv = blocks.ConvPixelShuffle(features=4, dtype=jnp.float32)
    want = conv.apply({"params": variables["params"]["main"]}, x)
    want += blocks.Duplicate(features=4, factor=2).apply({}, x)
    np.testing.assert_array_equal(both.apply(variables, x), want)


def test_linear_attention_equals_normalised_relu_weights():
    qkv = np.random.default_rng(2).normal(size=(2, 7, 3, 12)).astype(np.float32)
    q, k, v = np.split(qkv, 3, axis=-1)
    weights = np.einsum("bnkd,bmkd->bknm", np.maximum(q, 0), np.maximum(k, 0))
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-15)
    want = np.einsum("bknm,bmkd->bnkd", weights, v)
    np.testing.assert_allclose(blocks.linear_attention(qkv), want, atol=1e-5)


def test_pixel_norm_is_over_channels_with_bias():
    random = np.random.default_rng(3)
    x = random.normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = {"scale": random.normal(size=5), "bias": random.normal(size=5)}
    want = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    want = want * params["scale"] + params["bias"]
    np.testing.assert_allclose(PixelRMSNorm().apply({"params": params}, x), want, rtol=1e-5)


def test_batch_norm_moves_towards_the_unbiased_variance():
    random = np.random.default_rng(4)
    x = random.normal(2.0, 3.0, size=(2, 3, 1, 4)).astype(np.float32)
    params = {"scale": random.normal(size=4), "bias": random.normal(size=4)}
    old = {"running_mean": random.normal(size=4), "running_var": random.uniform(1, 2, size=4)}
    variables = {"params": params, "batch_stats": old}
    got, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    flat = x.reshape(6, 4)
    normed = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    want = (normed * params["scale"] + params["bias"]).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    new = updates["batch_stats"]
    want_mean = 0.9 * old["running_mean"] + 0.1 * flat.mean(0)
    np.testing.assert_allclose(new["running_mean"], want_mean, rtol=1e-5)
    want_var = 0.9 * old["running_var"] + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(new["running_var"], want_var, rtol=1e-5)
    steady = BatchNorm().apply(variables, x)
    normed = (x - old["running_mean"]) / np.sqrt(old["running_var"] + 1e-5)
    np.testing.assert_allclose(
        steady, normed * params["scale"] + params["bias"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "config",
    [SMALL, SMALL | dict(depth_list=(0, 1, 1), norm="bn2d", upsample_block_type="InterpolateConv")],
)
def test_head_of_features_is_the_decoder(config):
    decoder, variables = Decoder(**config), random_variables(config)

    @jax.jit
    def run(z):
        features = decoder.apply(variables, z, method=Decoder.features)
        return decoder.apply(variables, z), decoder.apply(variables, features, method=Decoder.head)

    whole, split = run(latents(8))
    assert whole.shape == (2, 8, 12, 3)
    assert float(jnp.abs(whole).max()) > 0
    np.testing.assert_array_equal(whole, split)


def test_gradient_of_the_last_kernel_through_its_layer_alone():
    """What the adaptive weight of the adversarial loss needs: one VJP through `head`."""
    decoder, variables = Decoder(**SMALL), random_variables(SMALL)
    cotangent = np.random.default_rng(5).normal(size=(2, 8, 12, 3)).astype(np.float32)
    *path, leaf = decoder.last_kernel_path

    def replaced(kernel):
        params = jax.tree.map(lambda x: x, variables["params"])
        functools.reduce(lambda node, name: node[name], path, params)[leaf] = kernel
        return {**variables, "params": params}

    @jax.jit
    def gradients(z, kernel):
        features = decoder.apply(variables, z, method=Decoder.features)
        head = lambda k: decoder.apply(replaced(k), features, method=Decoder.head)  # noqa: E731
        whole = lambda k: decoder.apply(replaced(k), z)  # noqa: E731
        return jax.vjp(head, kernel)[1](cotangent)[0], jax.vjp(whole, kernel)[1](cotangent)[0]

    kernel = functools.reduce(lambda node, name: node[name], (*path, leaf), variables["params"])
    head, whole = gradients(latents(8), kernel)
    assert head.shape == (3, 3, 4, 3)
    np.testing.assert_allclose(head, whole, rtol=1e-5, atol=1e-5)


def test_names_follow_the_checkpoint():
    config = SMALL | dict(
        depth_list=(0, 1, 1),
        width_list=(4, 32, 32),
        block_type=("ResBlock", "ResBlock", "EViTS5_GLU"),
        norm=("bn2d", "bn2d", "pixel_trms2d"),
        upsample_shortcut="InterpolateConv",
        in_shortcut=None,
        out_norm=None,
    )
    variables = shapes_of(config)
    evit, res = "stages_0/op_list_0", "stages_1/op_list_1/main"
    assert leaf_paths(variables["params"]) == {
        "project_in/conv/bias": (32,),
        "project_in/conv/kernel": (3, 3, 8, 32),
        f"{evit}/context_module/main/aggreg_0_0/kernel": (5, 5, 1, 96),
        f"{evit}/context_module/main/aggreg_0_1/kernel": (1, 1, 32, 96),
        f"{evit}/context_module/main/proj/conv/kernel": (1, 1, 64, 32),
        f"{evit}/context_module/main/proj/norm/bias": (32,),
        f"{evit}/context_module/main/proj/norm/scale": (32,),
        f"{evit}/context_module/main/qkv/conv/kernel": (1, 1, 32, 96),
        f"{evit}/local_module/main/depth_conv/conv/bias": (256,),
        f"{evit}/local_module/main/depth_conv/conv/kernel": (3, 3, 1, 256),
        f"{evit}/local_module/main/inverted_conv/conv/bias": (256,),
        f"{evit}/local_module/main/inverted_conv/conv/kernel": (1, 1, 32, 256),
        f"{evit}/local_module/main/point_conv/conv/kernel": (1, 1, 128, 32),
        f"{evit}/local_module/main/point_conv/norm/bias": (32,),
        f"{evit}/local_module/main/point_conv/norm/scale": (32,),
        "stages_1/op_list_0/main/conv/conv/bias": (128,),
        "stages_1/op_list_0/main/conv/conv/kernel": (3, 3, 32, 128),
        "stages_1/op_list_0/shortcut/conv/conv/bias": (32,),
        "stages_1/op_list_0/shortcut/conv/conv/kernel": (3, 3, 32, 32),
        f"{res}/conv1/conv/bias": (32,),
        f"{res}/conv1/conv/kernel": (3, 3, 32, 32),
        f"{res}/conv2/conv/kernel": (3, 3, 32, 32),
        f"{res}/conv2/norm/bias": (32,),
        f"{res}/conv2/norm/scale": (32,),
        "project_out/op_list_1/conv/conv/bias": (12,),
        "project_out/op_list_1/conv/conv/kernel": (3, 3, 32, 12),
    }
    assert leaf_paths(variables["batch_stats"]) == {
        f"{res}/conv2/norm/running_mean": (32,),
        f"{res}/conv2/norm/running_var": (32,),
    }


def test_evit_blocks_have_no_norm_under_trms2d():
    config = SMALL | dict(width_list=(32, 32, 32), block_type="EViT_GLU", norm="trms2d")
    paths = leaf_paths(shapes_of(config)["params"])
    assert not [path for path in paths if path.startswith("stages") and "norm" in path]


def test_norms_of_dcae_configs_are_renamed():
    got = from_dcae({"norm": ["bn2d", "trms2d"], "out_act": "silu"})
    assert got == {
        "norm": ("bn2d", "pixel_trms2d"),
        "out_norm": "pixel_trms2d",
        "out_act": "silu",
    }


def test_bfloat16_stays_near_float32():
    """5% of the largest value after about ten convolutions; norms and residuals are float32."""
    variables = random_variables(SMALL)
    want = jax.jit(Decoder(**SMALL).apply)(variables, latents(8))
    got = jax.jit(Decoder(**SMALL, dtype=jnp.bfloat16).apply)(variables, latents(8))
    assert got.dtype == jnp.float32
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    print(f"bfloat16 error {error:.4f}")
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_list": (1, 1)}, "depth_list needs one entry for each of the 3 stages"),
        ({"norm": ("bn2d",)}, "norm needs one entry for each of the 3 stages"),
        ({"depth_list": (1, 0, 1)}, "depth_list may be 0 for the first entry only"),
        ({"upsample_match_channel": False}, "needs equal widths"),
        ({"in_shortcut": "InterpolateConv"}, "in_shortcut is one of None, duplicating; got"),
        ({"norm": "ln"}, "norm is one of .* got 'ln'"),
        ({"width_list": (4, 8, 12)}, "duplicating shortcut divide .*; got 8 and 12"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(SMALL | change)
