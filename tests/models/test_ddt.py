"""DiT^DH: sizes, initialisation, execution options, precision, encoder state, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models.ddt import DiTDH
from dinosae_jax.models.dit import FIXED_BASES
from dinosae_jax.sizes import DIT_DH
from tests.models import dit_checks

TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": (32, 48),
    "depth": (2, 2),
    "num_heads": (4, 3),
    "num_classes": 10,
}


def _tiny(**changes):
    return DiTDH(**TINY | changes)


# Parameters counted on RAE's DiTwDDTHead: size, channels, all, trainable.
COUNTS = [
    ("S", 768, 196_455_764, 196_357_204),
    ("S", 1024, 197_602_900, 197_504_340),
    ("B", 768, 294_295_892, 294_099_028),
    ("B", 1024, 295_541_332, 295_344_468),
    ("L", 768, 621_744_436, 621_482_036),
    ("L", 1024, 623_055_412, 622_793_012),
    ("XL", 768, 838_675_796, 838_380_628),
    ("XL", 1024, 840_019_540, 839_724_372),
]


@pytest.mark.parametrize(
    ("size", "channels", "everything", "trainable"),
    [
        *(pytest.param(*each, marks=pytest.mark.slow) for each in COUNTS[1:-1]),
        COUNTS[0],
        COUNTS[-1],
    ],
)
def test_parameter_counts(size, channels, everything, trainable):
    module = DiTDH(**DIT_DH[size], in_channels=channels)
    assert dit_checks.count(module, channels, FIXED_BASES) == (everything, trainable)


def test_head_has_5461_hidden_units():
    args = dit_checks.batch(1, 16, 1024, 1000)
    params = jax.eval_shape(DiTDH().init, jax.random.key(0), *args)["params"]
    assert params["blocks_head"]["mlp"]["w12"]["kernel"].shape == (2, 2048, 2 * 5461)


@functools.cache
def initial():
    """A module and its variables at initialisation."""
    module = _tiny(hidden_size=(64, 48))
    return module, jax.jit(module.init)(jax.random.key(0), *dit_checks.batch())


@pytest.mark.slow
def test_initialisation_is_torchs_default():
    params = initial()[1]["params"]

    def spread(linear, fan_in):
        for leaf in (linear["kernel"], linear["bias"]):
            assert 0.9 * fan_in**-0.5 < np.abs(leaf).max() <= fan_in**-0.5

    spread(params["blocks_encoder"]["attn"]["qkv"], 64)
    spread(params["blocks_encoder"]["mlp"]["w3"], 170)
    spread(params["blocks_head"]["mlp"]["w12"], 48)
    spread(params["s_projector"], 64)
    for name, fan_in in (("mlp_0", 512), ("mlp_2", 64)):
        assert abs(np.std(params["t_embedder"][name]["kernel"]) - 0.02) < 2e-3
        assert 0.8 * fan_in**-0.5 < np.abs(params["t_embedder"][name]["bias"]).max() < fan_in**-0.5
    for name, width in (("s_embedder", 64), ("x_embedder", 48)):
        kernel = np.abs(params[name]["proj"]["kernel"])
        assert 0.95 * np.sqrt(6 / (8 + width)) < kernel.max() <= np.sqrt(6 / (8 + width))
        assert not np.any(params[name]["proj"]["bias"])


def test_output_is_exactly_zero_at_initialisation():
    (module, params), args = initial(), dit_checks.batch()
    v = jax.jit(module.apply)(params, *args)
    assert v.shape == args[0].shape and v.dtype == jnp.float32 and not np.any(v)


OPTIONS = [(False, "none"), (True, "full")]  # LightningDiT's test has the others


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    args = dit_checks.batch()
    params = dit_checks.random_params(_tiny(), *args)
    expected = dit_checks.value_and_gradients(_tiny(), params, args)
    for scan_layers, remat in OPTIONS:
        other = _tiny(scan_layers=scan_layers, remat=remat)
        actual = dit_checks.value_and_gradients(other, params, args)
        # Same operations; the compiler may fuse and so round them differently.
        for a, b in zip(actual, expected, strict=True):
            assert dit_checks.relative_error(a, b) < 1e-6, (scan_layers, remat)


def test_bfloat16_keeps_the_sensitive_parts_in_float32():
    args = dit_checks.batch()
    module = _tiny(dtype=jnp.bfloat16, use_qknorm=True)
    params = dit_checks.random_params(module, *args)
    dit_checks.check_float32_parts(jax.make_jaxpr(module.apply)({"params": params}, *args).jaxpr)


def test_bfloat16_error_is_that_of_its_mantissa():
    args = dit_checks.batch(b=8)
    params = dit_checks.random_params(_tiny(), *args)
    exact = dit_checks.apply(_tiny(), params, *args)
    rounded = dit_checks.apply(_tiny(dtype=jnp.bfloat16), params, *args)
    # bfloat16 rounds by 2^-9 = 0.2%; a few products in a row stay below 1%.
    assert 1e-5 < dit_checks.relative_error(rounded, exact) < 1e-2


def test_encoder_state_replaces_the_encoder():
    module, (x, t, y) = _tiny(), dit_checks.batch()
    params = dit_checks.random_params(module, x, t, y)
    v, seen = dit_checks.apply(module, params, x, t, y, intermediates=True)
    state = jax.nn.silu(seen["blocks.1"] + seen["t_embedder"][:, None])
    other = dit_checks.apply(module, params, x, 1 - t, y[::-1], encoder_state=state)
    # Time and labels reach the head through the state alone; eager and fused rounding differ.
    np.testing.assert_allclose(other, v, rtol=1e-5, atol=1e-6)


def test_equal_widths_have_no_projection_and_no_positions_no_table():
    module = _tiny(hidden_size=(32, 32), num_heads=(4, 4), use_pos_embed=False)
    params = jax.eval_shape(module.init, jax.random.key(0), *dit_checks.batch())["params"]
    assert params.keys().isdisjoint({"s_projector", "pos_embed"})


@pytest.mark.slow
def test_without_positions_tokens_are_a_set():
    (x, t, y), order = dit_checks.batch(), np.random.default_rng(2).permutation(16)
    tokens = x.reshape(3, 16, 8)
    errors = []
    for use_rope in (False, True):
        module = _tiny(use_pos_embed=False, use_rope=use_rope)
        params = dit_checks.random_params(module, x, t, y, scale=0.3)
        v = dit_checks.apply(module, params, tokens, t, y)[:, order]
        shuffled = dit_checks.apply(module, params, tokens[:, order], t, y)
        errors.append(dit_checks.relative_error(shuffled, v))
    # Sums over keys in another order; RoPE breaks the symmetry by far more.
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (4, 5)}, "hidden_size must be a multiple of num_heads; got 48 and 5"),
        ({"in_channels": 4}, r"x must be \[b, 4, 4, 4\] or \[b, 16, 4\]"),
    ],
)
def test_user_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_tiny(**changes).init, jax.random.key(0), *dit_checks.batch())
