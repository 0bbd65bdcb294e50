"""The autoencoder's functions over stem, ViT and decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax import names
from dinosae_jax.models import autoencoder as ae
from dinosae_jax.models import preprocessing

CONFIG = {
    "stem": {"embed_dim": 16, "widths": (4, 8, 8)},
    "vit": {"embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_hidden": 32},
    "decoder": {
        "latent_channels": 16,
        "width_list": (4, 4, 8, 8, 16),
        "depth_list": (0, 1, 1, 1, 1),
    },
}
BATCH_NORM = CONFIG | {"decoder": CONFIG["decoder"] | {"norm": "bn2d"}}


@functools.cache
def modules_and_variables(norm="trms2d"):
    """Modules and random variables whose transformer matters."""
    config = BATCH_NORM if norm == "bn2d" else CONFIG
    modules, random = ae.build(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: ae.init(modules, key, 32), jax.random.key(0))
    draw = lambda x: random.uniform(0.1, 0.3, x.shape).astype(np.float32)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    for role in ("stem", "decoder"):
        params = variables[role]["params"]
        variables[role]["params"] = jax.tree.map(lambda x: x - np.float32(0.2), params)
    return modules, variables


def images(height=32, width=48):
    shape = (2, height, width, 3)
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


@pytest.mark.slow
def test_init_under_jit_makes_the_three_roles():
    modules = ae.build(BATCH_NORM)
    variables = jax.jit(lambda key: ae.init(modules, key, 32))(jax.random.key(0))
    assert {role: set(value) for role, value in variables.items()} == {
        "stem": {"params"},
        "vit": {"params"},
        "decoder": {"params", "batch_stats"},
    }
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert "patch_embed" in variables["vit"]["params"]


def test_there_and_back_for_images_that_are_not_square():
    modules, variables = modules_and_variables()
    grids = []

    @jax.jit
    def run(x):
        student = ae.encode(modules, variables, x)
        teacher = ae.encode_teacher(modules, variables, x)
        grids.extend([student.grid, teacher.grid])
        return student, teacher, ae.decode(modules, variables, student.tokens, student.grid)

    student, teacher, decoded = run(images())
    assert grids == [(2, 3), (2, 3)]
    assert student.tokens.shape == teacher.tokens.shape == (2, 6, 16)
    assert student.cls.shape == teacher.cls.shape == (2, 16)
    assert decoded.shape == (2, 32, 48, 3)
    assert {x.dtype for x in (student.tokens, teacher.cls, decoded)} == {jnp.dtype("float32")}
    assert float(jnp.abs(student.tokens - teacher.tokens).max()) > 1e-3


def test_encoder_sees_images_without_imagenet_mean_and_deviation():
    pixel = jnp.array(names.IMAGENET_MEAN) + 2 * jnp.array(names.IMAGENET_STD)
    how = ae.build(CONFIG).preprocessing
    got = preprocessing.prepare(jnp.broadcast_to(pixel, (1, 16, 16, 3)), how)
    np.testing.assert_allclose(got, 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("pixel_range", "raw", "want"),
    [
        ("unit", 0.25, [0.25] * 3),
        ("symmetric", -0.5, [0.25] * 3),
        ("imagenet", 1.0, [0.714, 0.68, 0.631]),
    ],
)
def test_pixel_range_of_the_decoder(pixel_range, raw, want):
    modules = ae.build(CONFIG | {"pixel_range": pixel_range})
    got = ae.to_pixels(modules, jnp.full((1, 1, 1, 3), raw))
    np.testing.assert_allclose(got[0, 0, 0], want, rtol=1e-6)


def test_patch_stem_with_the_teachers_weights_is_the_teacher():
    modules = ae.build(CONFIG | {"stem": {"kind": "patch", "embed_dim": 16}})
    vit = modules_and_variables()[1]["vit"]
    variables = {"vit": vit, "stem": {"params": vit["params"]["patch_embed"]}}
    run = jax.jit(
        lambda x: (ae.encode(modules, variables, x), ae.encode_teacher(modules, variables, x))
    )
    student, teacher = run(images())
    np.testing.assert_array_equal(student.tokens, teacher.tokens)


def test_gradient_reaches_the_stem_through_the_frozen_transformer():
    modules, variables = modules_and_variables()
    direction = np.random.default_rng(2).normal(size=(2, 6, 16)).astype(np.float32)

    @jax.jit
    def gradient(stem, x):
        def loss(params):
            roles = {"vit": variables["vit"], "stem": {"params": params}}
            return jnp.sum(direction * ae.encode(modules, roles, x).tokens)

        return jax.grad(loss)(stem)

    leaves = jax.tree.leaves(gradient(variables["stem"]["params"], images()))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves)


def test_running_statistics_come_back_in_training_only():
    modules, variables = modules_and_variables("bn2d")
    z = np.random.default_rng(3).normal(size=(2, 6, 16)).astype(np.float32)
    run = jax.jit(
        lambda z: {
            (train, f.__name__): f(modules, variables, z, (2, 3), train)
            for train in (False, True)
            for f in (ae.decode, ae.decode_features)
        }
    )
    outputs = run(z)
    _, same = outputs[False, "decode_features"]
    _, new = outputs[True, "decode_features"]
    steady, train = (outputs[training, "decode"] for training in (False, True))
    old = variables["decoder"]["batch_stats"]
    assert jax.tree.structure(same) == jax.tree.structure(new) == jax.tree.structure(old)
    jax.tree.map(np.testing.assert_array_equal, same, old)
    changes = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (new, old)), strict=True)]
    assert min(changes) > 0
    assert float(jnp.abs(steady - train).max()) > 1e-3


def test_grid_and_tokens_must_agree():
    modules, variables = modules_and_variables()
    with pytest.raises(ValueError, match="one token per cell of the grid; got 6"):
        ae.decode(modules, variables, jnp.zeros((1, 6, 16)), (2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": {"embed_dim": 8}}, r"must be equal; got \(8, 16, 16\)"),
        ({"stem": {"embed_dim": 16, "kind": "mlp"}}, "model.stem.kind must be one of conv, patch"),
        ({"pixel_range": "bytes"}, "pixel_range is one of imagenet, unit, symmetric"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ae.build(CONFIG | change)
