"""DINOv3: sizes, layout of the parameters, masks, rematerialisation, precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.vit import SwiGlu, VisionTransformer
from dinosae_jax.sizes import VIT

TINY = dict(embed_dim=32, depth=2, num_heads=2, ffn_hidden=64, num_storage_tokens=2)

# Reference counts: without rope_embed/periods (a buffer) and the keys' bias mask. The 7B row also
# counts local_cls_norm (2 * 4096), which serves local crops in DINOv3's own training only.
PARAMETERS = {
    "dinov3_vits16": 21_601_152,
    "dinov3_vits16plus": 28_697_472,
    "dinov3_vitb16": 85_669_632,
    "dinov3_vitl16": 303_154_176,
    "dinov3_vitl16plus": 403_915_776,
    "dinov3_vith16plus": 840_633_600,
    "dinov3_vit7b16": 6_716_043_264 - 2 * 4096,
}


@functools.cache
def tiny_variables():
    """Random parameters whose blocks matter: LayerScale near 1 in place of 1e-5, biases not 0."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(VisionTransformer(**TINY).init, jax.random.key(0), tiny_patches())

    def draw(path, x):
        name = path[-1].key
        mean = {"gamma": 0.8, "scale": 1.0, "periods": 3.0}.get(name, 0.0)
        return (mean + 0.2 * random.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def tiny_patches():
    return np.random.default_rng(1).normal(size=(2, 2, 3, 32)).astype(np.float32)


@functools.cache
def outputs_and_gradients(scan_layers, remat):
    """Loss of a random projection of all outputs, and its gradients."""
    vit = VisionTransformer(**TINY, scan_layers=scan_layers, remat=remat)
    weights = np.random.default_rng(2).normal(size=(2, 9, 32)).astype(np.float32)

    def loss(variables, patches):
        out = vit.apply(variables, patches)
        tokens = jnp.concatenate([out.cls[:, None], out.storage, out.patches], axis=1)
        return jnp.sum(weights * tokens), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), gradients = step(tiny_variables(), tiny_patches())
    return {"out": out, "gradients": gradients}


@pytest.mark.parametrize("name", VIT)
def test_published_sizes_have_the_reference_parameter_counts(name):
    config = VIT[name]
    vit = VisionTransformer(**config)
    patches = jax.ShapeDtypeStruct((1, 2, 2, config["embed_dim"]), jnp.float32)
    params = jax.eval_shape(vit.init, jax.random.key(0), patches)["params"]
    head_dim = config["embed_dim"] // config["num_heads"]
    assert params.pop("rope_embed")["periods"].shape == (head_dim // 4,)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_parameters_carry_the_reference_names_with_stacked_blocks():
    params = tiny_variables()["params"]
    shapes = {
        "/".join(str(k.key) for k in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == {
        "blocks/attn/proj/bias": (2, 32),
        "blocks/attn/proj/kernel": (2, 32, 32),
        "blocks/attn/qkv/bias": (2, 96),
        "blocks/attn/qkv/kernel": (2, 32, 96),
        "blocks/ls1/gamma": (2, 32),
        "blocks/ls2/gamma": (2, 32),
        "blocks/mlp/fc1/bias": (2, 64),
        "blocks/mlp/fc1/kernel": (2, 32, 64),
        "blocks/mlp/fc2/bias": (2, 32),
        "blocks/mlp/fc2/kernel": (2, 64, 32),
        "blocks/norm1/bias": (2, 32),
        "blocks/norm1/scale": (2, 32),
        "blocks/norm2/bias": (2, 32),
        "blocks/norm2/scale": (2, 32),
        "cls_token": (1, 1, 32),
        "mask_token": (1, 32),
        "norm/bias": (32,),
        "norm/scale": (32,),
        "patch_embed/proj/bias": (32,),
        "patch_embed/proj/kernel": (16, 16, 3, 32),
        "rope_embed/periods": (4,),
        "storage_tokens": (1, 2, 32),
    }


@pytest.mark.slow  # in the fast suite: of LightningDiT
@pytest.mark.parametrize(
    ("scan_layers", "remat"), [(False, "none"), (True, "dots"), (True, "full")]
)
def test_unrolling_and_remat_change_nothing(scan_layers, remat):
    """Within 1e-6 of the largest value of each array; the order of sums may differ."""
    want = outputs_and_gradients(True, "none")
    got = outputs_and_gradients(scan_layers, remat)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(x - y).max()) <= 1e-6 * max(1.0, float(jnp.abs(y).max()))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_unrolled_blocks_leave_no_loop(scan_layers):
    vit = VisionTransformer(**TINY, scan_layers=scan_layers)
    text = jax.jit(vit.apply).lower(tiny_variables(), tiny_patches()).as_text()
    assert ("stablehlo.while" in text) == scan_layers


def test_periods_get_no_gradient():
    params_gradient = outputs_and_gradients(True, "none")["gradients"][0]["params"]
    assert not jnp.any(params_gradient["rope_embed"]["periods"])
    assert jnp.any(params_gradient["blocks"]["attn"]["qkv"]["kernel"])


def test_masked_patches_become_the_mask_token():
    vit, variables = VisionTransformer(**TINY), tiny_variables()
    mask = np.zeros((2, 6), bool)
    mask[0, 4] = True
    by_hand = tiny_patches().copy()
    by_hand[0, 1, 1] = variables["params"]["mask_token"][0]
    run = jax.jit(vit.apply)
    np.testing.assert_allclose(
        run(variables, tiny_patches(), mask).prenorm, run(variables, by_hand).prenorm, atol=1e-5
    )


def test_patch_embedding_cuts_what_is_not_a_whole_patch():
    vit = VisionTransformer(**TINY)
    embed = jax.jit(functools.partial(vit.apply, method=VisionTransformer.embed_patches))
    images = np.random.default_rng(3).normal(size=(1, 70, 50, 3)).astype(np.float32)
    got = embed(tiny_variables(), images)
    assert got.shape == (1, 4, 3, 32)
    np.testing.assert_allclose(got, embed(tiny_variables(), images[:, :64, :48]), atol=1e-5)


def test_bfloat16_keeps_float32_outputs_and_stays_near():
    """3% of the largest value: 1% is measured with these weights, which are far from trained."""
    want = outputs_and_gradients(True, "none")["out"]
    vit = VisionTransformer(**TINY, dtype=jnp.bfloat16)
    got = jax.jit(vit.apply)(tiny_variables(), tiny_patches())
    assert got.patches.dtype == got.prenorm.dtype == jnp.float32
    error = float(jnp.abs(got.patches - want.patches).max() / jnp.abs(want.patches).max())
    print(f"bfloat16 error {error:.4f}")
    assert 0 < error < 0.03


def test_swiglu_is_gated_by_silu_of_the_first_layer():
    random = np.random.default_rng(4)
    x = random.normal(size=(1, 4, 3)).astype(np.float32)
    kernels = {"w1": (3, 5), "w2": (3, 5), "w3": (5, 3)}
    params = {
        name: {"kernel": random.normal(size=shape), "bias": random.normal(size=shape[1:])}
        for name, shape in kernels.items()
    }
    got = SwiGlu(5, jnp.float32).apply({"params": params}, x)
    linear = lambda name, v: v @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    gate = linear("w1", x)
    want = linear("w3", gate / (1 + np.exp(-gate)) * linear("w2", x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_initial_blocks_are_nearly_the_identity():
    """LayerScale starts at 1e-5, biases at 0: a random ViT passes its patches through."""
    vit = VisionTransformer(**TINY | dict(depth=1))
    out, variables = jax.jit(vit.init_with_output)(jax.random.key(0), tiny_patches())
    blocks = variables["params"]["blocks"]
    assert not jnp.any(blocks["attn"]["qkv"]["bias"])
    np.testing.assert_allclose(blocks["ls1"]["gamma"], 1e-5)
    np.testing.assert_allclose(out.prenorm[:, 3:], tiny_patches().reshape(2, 6, 32), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "some"}, "remat is 'none', 'dots' or 'full'; got 'some'"),
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads; got 32 and 3"),
        ({"ffn_layer": "relu"}, "ffn_layer is one of mlp, .*; got 'relu'"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    vit = VisionTransformer(**TINY | change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(vit.init, jax.random.key(0), tiny_patches())
