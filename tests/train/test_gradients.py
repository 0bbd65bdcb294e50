"""Gradients as promised: float32 sums, reduced in float32, once a step; products as asked for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rfm_dit, sae_stage2
from dinosae_jax.perf import collectives, programs
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import accumulate
from tests import tiny


def step_text(config, devices=8, compiled=True):
    """A training step's program on so many CPU devices, as text."""
    mesh = sharding.make_mesh(config.mesh.fsdp, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = programs.build(config, mesh)
        lowered = program.step.lower(*program.arguments)
    return lowered.compile().as_text() if compiled else lowered.as_text()


def flow(**changes):
    config = tiny.small_flow(**{"batch_size": 32, "data.latents": "a cache", **changes})
    return precision.resolve_config(config)


def reduced(text):
    """Types of what the devices add up, largest array of each all-reduce."""
    return re.findall(r"= \(?(\w+)\[[\d,]*\][^=]* all-reduce(?:-start)?\(", text)


@pytest.fixture(scope="module")
def bfloat16_step():
    return step_text(flow(dtype="bfloat16"))


@pytest.mark.slow
def test_devices_add_up_float32_under_bfloat16(bfloat16_step):
    text = bfloat16_step
    assert "bf16[" in text
    assert set(reduced(text)) <= {"f32", "s32", "u32", "pred"}
    # A CPU's compiler makes a bfloat16 reduction a float32 one, and marks it so.
    assert not re.search(r"all-reduce\(.*promoted", text)


@pytest.mark.slow
def test_accumulation_reduces_once_a_step(bfloat16_step):
    once = collectives.census(bfloat16_step)["all-reduce"]
    accumulated = step_text(flow(dtype="bfloat16", accumulation=4))
    four = collectives.census(accumulated)["all-reduce"]
    assert four.runs <= once.runs
    assert four.bytes <= 1.05 * once.bytes


def test_means_of_devices_are_the_mean_of_the_batch():
    mesh = sharding.make_mesh(devices=jax.devices()[:8])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=3), jnp.float32)

    def one(part):
        return jax.value_and_grad(lambda w: jnp.mean((part @ w) ** 2))(weight)

    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: accumulate.mean_over_micro_batches(one, (x,), 4))(x)
    for ours, theirs in zip(got, one(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        ("float32", "auto", "highest"),
        ("bfloat16", "auto", "default"),
        ("float32", "high", "high"),
    ],
)
def test_matmul_precision_is_resolved(dtype, wanted, expected):
    config = rfm_dit.get_config("tiny")
    config.dtype, config.matmul_precision.compute = dtype, wanted
    resolved = precision.resolve_config(config).matmul_precision
    assert resolved.to_dict() == {
        "compute": expected,
        "output_head": "highest",
        "discriminator_heads": "highest",
    }


def products(text):
    """(element type, precision) of every matrix product and convolution of a lowered program."""
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            types = re.search(r": \(tensor<[^>]*?(\w+)>", line)
            exact = re.search(r"precision(?:_config)? = \[[^]]*(HIGHEST|HIGH|DEFAULT)", line)
            found.append((types[1].split("x")[-1], exact[1] if exact else "DEFAULT"))
    return found


def test_a_float32_run_multiplies_in_float32():
    found = products(step_text(flow(dtype="float32"), compiled=False))
    assert found
    assert set(found) == {("f32", "HIGHEST")}


def exact_products(config, devices=8):
    """How many products of float32 factors keep them."""
    return products(step_text(config, devices, compiled=False)).count(("f32", "HIGHEST"))


def test_the_output_head_of_a_bfloat16_run_multiplies_in_float32():
    found = products(step_text(flow(dtype="bfloat16"), compiled=False))
    assert ("bf16", "DEFAULT") in found
    rounded = flow(dtype="bfloat16", **{"matmul_precision.output_head": "default"})
    # Modulation and projection, each with the gradients of its kernel and of its input.
    assert found.count(("f32", "HIGHEST")) == exact_products(rounded) + 6


@pytest.mark.slow
def test_discriminator_heads_of_a_bfloat16_run_multiply_in_float32():
    config = sae_stage2.get_config("tiny")
    config.update_from_flattened_dict(tiny.SMALLEST)
    config.update_from_flattened_dict(
        {"batch_size": 8, "dtype": "bfloat16", "model.dino.patch_size": 56}
    )
    exact = exact_products(precision.resolve_config(config), devices=1)
    config.matmul_precision.discriminator_heads = "default"
    heads = 1 + len(config.model.dino.key_depths)
    # Three convolutions a head, on fakes for the generator, on fakes and reals for the heads.
    rounded = exact_products(precision.resolve_config(config), devices=1)
    assert exact - rounded >= 3 * 3 * heads
