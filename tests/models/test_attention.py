"""Attention's kernels against the path without one, and which one a device gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import attention, attention_rows, positions
from dinosae_jax.models.attention import Rotation, choose

SHAPES = {  # heads, their width, tokens, distance of rotated pairs (0: none)
    "LightningDiT-XL, 9 tokens a side": (16, 72, 81, 1),
    "a ViT with prefix tokens": (4, 64, 21, 32),
    "DiT^DH's head": (2, 128, 16, 1),
    "DINO v1": (6, 64, 50, 0),
    "narrow": (4, 8, 12, 1),
}
SLOW = ("LightningDiT-XL, 9 tokens a side", "DINO v1")


def inputs(heads, width, tokens, distance, dtype=jnp.float32):
    """A fused projection [2, n, 3d], a cotangent of the output, and the rotation."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(2, tokens, *shape)), dtype)  # noqa: E731
    angles = rng.normal(size=(tokens, width // 2)).astype(np.float32)
    rotation = None
    if distance:
        pairs = angles.reshape(tokens, -1, 1, distance)
        both = np.broadcast_to(pairs, (*pairs.shape[:2], 2, distance)).reshape(tokens, width)
        rotation = Rotation(np.cos(both), np.sin(both), distance)
    return draw(3 * heads * width), draw(heads * width), rotation


def value_and_pullback(function, qkv, cotangent):
    out, pullback = jax.vjp(function, qkv)
    return out, pullback(cotangent)[0]


def kernel(heads, rotation, qkv):
    tables = None
    if rotation is not None:
        tables = tuple(jnp.tile(table, (1, heads)) for table in (rotation.cos, rotation.sin))
    distance = 1 if rotation is None else rotation.distance
    return attention_rows.attend(qkv, tables, heads, distance, True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SHAPES]
)
def test_the_kernel_gives_the_values_and_gradients_of_the_path_without_one(name):
    heads, width, tokens, distance = SHAPES[name]
    qkv, cotangent, rotation = inputs(heads, width, tokens, distance)
    plain = functools.partial(attention.attention, num_heads=heads, rotation=rotation)
    want = jax.jit(functools.partial(value_and_pullback, plain))(qkv, cotangent)
    ours_of = functools.partial(value_and_pullback, functools.partial(kernel, heads, rotation))
    got = jax.jit(ours_of)(qkv, cotangent)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)


@pytest.mark.slow
def test_the_kernel_in_bfloat16_is_as_near_to_float32_as_the_path_without_one():
    qkv, cotangent, rotation = inputs(4, 64, 32, 32, jnp.bfloat16)
    plain = functools.partial(attention.attention, num_heads=4, rotation=rotation)
    exact = value_and_pullback(plain, qkv.astype(jnp.float32), cotangent.astype(jnp.float32))
    want = value_and_pullback(plain, qkv, cotangent)
    got = value_and_pullback(functools.partial(kernel, 4, rotation), qkv, cotangent)
    for ours, theirs, truth in zip(got, want, exact, strict=True):
        error = lambda x, truth=truth: float(jnp.abs(x - truth).mean())  # noqa: E731
        assert error(ours) < 1.2 * error(theirs)


def test_rotations_of_neighbours_are_those_of_the_diffusion_transformers():
    cos, sin = positions.rope_tables(4, 8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 16, 3, 8)), jnp.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    want = x * cos[:, None] + jnp.stack([-odd, even], -1).reshape(x.shape) * sin[:, None]
    np.testing.assert_array_equal(attention.rotate(x, Rotation(cos, sin, 1)), want)


@pytest.mark.parametrize(
    ("platform", "dtype", "heads", "width", "expected"),
    [
        ("cpu", jnp.bfloat16, 16, 1152, "xla"),
        ("tpu", jnp.float32, 16, 1152, "xla"),
        ("tpu", jnp.bfloat16, 4, 64, "xla"),  # half a register
        ("cuda", jnp.bfloat16, 16, 1152, "cudnn"),
        ("cuda", jnp.float32, 16, 1152, "xla"),
        ("cuda", jnp.bfloat16, 4, 16, "xla"),  # heads of 4
    ],
)
def test_a_device_gets_the_kernel_that_serves_it(platform, dtype, heads, width, expected):
    chosen = choose(platform, dtype, 256, width, heads)
    assert chosen.implementation == expected
    assert chosen.reason


@pytest.mark.parametrize(
    ("kind", "tokens", "width", "heads", "distance", "expected"),
    [
        ("TPU v6 lite", 256, 1152, 16, 1, "rows"),
        ("TPU v5p", 256, 2048, 16, 1, "rows"),
        ("TPU v5p", 261, 1024, 16, 32, "rows"),
        ("TPU v6 lite", 4096, 1152, 16, 1, "flash"),
        ("TPU v4", 256, 1152, 16, 1, "flash"),  # 16 MiB a core
    ],
)
def test_a_tpu_gets_whole_rows_where_they_fit(kind, tokens, width, heads, distance, expected):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        chosen = choose("tpu", jnp.bfloat16, tokens, width, heads, distance)
    assert chosen.implementation == expected
