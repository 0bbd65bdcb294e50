"""LightningDiT: sizes, initialisation, execution options, precision, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.dit import FIXED_BASES, LightningDiT, drop_labels
from dinosae_jax.sizes import LIGHTNING_DIT
from tests.models import dit_checks

TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def _tiny(**changes):
    return LightningDiT(**TINY | changes)


# Parameters counted on the originals: form, size, patch, channels, flags, all, trainable.
PLAIN = {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False}
COUNTS = [
    ("sinusoidal", "B", 1, 32, {}, 130_556_192, 130_359_584),
    ("sinusoidal", "B", 2, 32, {}, 130_556_288, 130_507_136),
    ("sinusoidal", "L", 2, 32, {}, 458_153_056, 458_087_520),
    ("sinusoidal", "XL", 1, 32, {}, 675_256_736, 674_961_824),
    ("sinusoidal", "XL", 2, 32, {}, 675_256_832, 675_183_104),
    ("sinusoidal", "1p0B", 1, 32, {}, 1_029_401_120, 1_029_007_904),
    ("sinusoidal", "1p6B", 1, 32, {}, 1_631_767_120, 1_631_308_368),
    ("sinusoidal", "XL", 1, 768, {}, 676_953_216, 676_658_304),
    ("sinusoidal", "XL", 1, 1024, {}, 677_543_296, 677_248_384),
    ("sinusoidal", "XL", 1, 32, PLAIN, 675_148_064, 675_148_064 - 256 * 1152),
    ("fourier", "S", 1, 768, {}, 33_649_792, 33_551_232),
    ("fourier", "S", 1, 1024, {}, 33_846_656, 33_748_096),
    ("fourier", "B", 1, 768, {}, 131_884_288, 131_687_424),
    ("fourier", "B", 1, 1024, {}, 132_277_760, 132_080_896),
    ("fourier", "L", 1, 768, {}, 459_923_424, 459_661_024),
    ("fourier", "L", 1, 1024, {}, 460_447_968, 460_185_568),
    ("fourier", "XL", 1, 768, {}, 677_248_384, 676_953_216),
    ("fourier", "XL", 1, 1024, {}, 677_838_464, 677_543_296),
]

COUNTED = (COUNTS[1], COUNTS[9], COUNTS[-1])  # patches, every flag, the largest with Fourier times


@pytest.mark.parametrize(
    ("form", "size", "patch", "channels", "flags", "everything", "trainable"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each not in COUNTED)) for each in COUNTS],
)
def test_parameter_counts(form, size, patch, channels, flags, everything, trainable):
    module = LightningDiT(
        **LIGHTNING_DIT[size], patch_size=patch, in_channels=channels, time_embedding=form, **flags
    )
    assert dit_checks.count(module, channels, FIXED_BASES) == (everything, trainable)


@functools.cache
def initial():
    """A module, its arguments, its parameters at initialisation."""
    module, args = _tiny(hidden_size=64, in_channels=16, depth=2), dit_checks.batch(channels=16)
    return module, args, jax.jit(module.init)(jax.random.key(0), *args)["params"]


def test_initialisation_is_the_references():
    params = initial()[2]

    def spread(leaf, bound):
        leaf = np.abs(np.asarray(leaf))
        assert 0.97 * bound < leaf.max() <= bound

    # Xavier of the fused matrices, not of their parts: 64 -> 192, 64 -> 2 * 170.
    spread(params["blocks"]["attn"]["qkv"]["kernel"], np.sqrt(6 / (64 + 192)))
    spread(params["blocks"]["mlp"]["w12"]["kernel"], np.sqrt(6 / (64 + 340)))
    spread(params["x_embedder"]["proj"]["kernel"], np.sqrt(6 / (16 + 64)))
    for name in ("mlp_0", "mlp_2"):
        assert abs(np.std(params["t_embedder"][name]["kernel"]) - 0.02) < 2e-3
        assert not np.any(params["t_embedder"][name]["bias"])
    assert abs(np.std(params["y_embedder"]["embedding_table"]["embedding"]) - 0.02) < 3e-3
    assert abs(np.std(params["t_embedder"]["W"]) - 1.0) < 0.15
    assert np.all(np.asarray(params["blocks"]["norm1"]["scale"]) == 1)
    layers = np.asarray(params["blocks"]["attn"]["qkv"]["kernel"])
    assert layers.shape == (2, 64, 192)
    assert np.abs(layers[0] - layers[1]).max() > 0.1
    for name in ("qkv", "proj"):
        assert not np.any(params["blocks"]["attn"][name]["bias"])


def test_patch_embedding_starts_as_one_flat_matrix():
    module = _tiny(patch_size=2)
    params = jax.jit(module.init)(jax.random.key(0), *dit_checks.batch())["params"]
    kernel = np.abs(params["x_embedder"]["proj"]["kernel"])
    assert kernel.shape == (2, 2, 8, 32)
    assert 0.97 * np.sqrt(6 / (32 + 32)) < kernel.max() <= np.sqrt(6 / (32 + 32))


def test_output_is_exactly_zero_at_initialisation():
    module, args, params = initial()
    v, seen = dit_checks.apply(module, params, *args, intermediates=True)
    assert v.shape == args[0].shape and not np.any(v)
    # Zero gates: every block passes its input on.
    tokens = seen["x_embedder"] + params["pos_embed"]
    np.testing.assert_array_equal(seen["blocks.1"], tokens)


def test_tokens_and_grid_are_the_same_input():
    module, (x, t, y) = _tiny(), dit_checks.batch()
    params = dit_checks.random_params(module, x, t, y)
    v = dit_checks.apply(module, params, x, t, y)
    tokens = dit_checks.apply(module, params, x.reshape(3, 16, 8), t, y)
    assert tokens.shape == (3, 16, 8)
    np.testing.assert_array_equal(tokens.reshape(v.shape), v)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        (False, "full"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, "dots"), (True, "full"))),
        pytest.param(False, "none", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(scan_layers, remat):
    args = dit_checks.batch()
    module = _tiny(use_qknorm=True)
    params = dit_checks.random_params(module, *args)
    expected = dit_checks.value_and_gradients(module, params, args)
    other = _tiny(use_qknorm=True, scan_layers=scan_layers, remat=remat)
    actual = dit_checks.value_and_gradients(other, params, args)
    # Same operations; the compiler may fuse and so round them differently.
    for a, b in zip(actual, expected, strict=True):
        assert dit_checks.relative_error(a, b) < 1e-6


def test_unrolled_program_has_no_loop():
    args = dit_checks.batch()
    for scan_layers in (True, False):
        module = _tiny(scan_layers=scan_layers)
        params = dit_checks.random_params(module, *args)
        text = jax.jit(module.apply).lower({"params": params}, *args).as_text()
        assert ("stablehlo.while" in text) == scan_layers


def test_bfloat16_keeps_the_sensitive_parts_in_float32():
    args = dit_checks.batch()
    module = _tiny(dtype=jnp.bfloat16, use_qknorm=True)
    params = dit_checks.random_params(module, *args)
    jaxpr = jax.make_jaxpr(module.apply)({"params": params}, *args).jaxpr
    dit_checks.check_float32_parts(jaxpr)


def test_bfloat16_error_is_that_of_its_mantissa():
    args = dit_checks.batch(b=8)
    params = dit_checks.random_params(_tiny(), *args)
    exact = dit_checks.apply(_tiny(), params, *args)
    rounded = dit_checks.apply(_tiny(dtype=jnp.bfloat16), params, *args)
    assert rounded.dtype == jnp.float32
    # bfloat16 rounds by 2^-9 = 0.2%; a few products in a row stay below 1%.
    assert 1e-5 < dit_checks.relative_error(rounded, exact) < 1e-2


def test_null_label_needs_its_row():
    x, t, y = dit_checks.batch()
    module = _tiny(class_dropout_prob=0.0)
    params = dit_checks.random_params(module, x, t, y)
    assert params["y_embedder"]["embedding_table"]["embedding"].shape == (10, 32)
    v = dit_checks.apply(module, params, x, t, y)
    assert np.isfinite(v[:2]).all() and np.isnan(v[2]).all()


def test_drop_labels_compares_each_draw():
    labels = jnp.asarray([3, 4, 5, 6], jnp.int32)
    dropped = drop_labels(labels, jnp.asarray([0.0, 0.0999, 0.1, 0.9]), 0.1, null=10)
    np.testing.assert_array_equal(dropped, [10, 10, 5, 6])
    assert dropped.dtype == jnp.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads; got 32 and 5"),
        ({"num_heads": 16}, "head width divisible by 4; got 2"),
        ({"patch_size": 3}, "input_size must be a multiple of patch_size; got 4 and 3"),
        ({"input_size": 8}, r"x must be \[b, 8, 8, 8\] or \[b, 64, 8\]"),
        ({"remat": "some"}, "remat is 'none', 'dots' or 'full'; got 'some'"),
        ({"time_embedding": "learned"}, "time_embedding must be .* got 'learned'"),
    ],
)
def test_user_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_tiny(**changes).init, jax.random.key(0), *dit_checks.batch())
