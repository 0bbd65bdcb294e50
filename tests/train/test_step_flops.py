"""The sum of a training step's FLOPs against recorded values and the compiler's count."""

import jax
import pytest

from configs import rfm_ddt, rfm_dit, sae_stage1, sae_stage2, sae_stage3, sae_stage4
from dinosae_jax.perf import programs
from dinosae_jax.runtime import sharding
from dinosae_jax.train import step_flops

ENCODE = 167.1
# GFLOPs per image; the flow reads images here, so encoding is in it.
PUBLISHED = [
    (sae_stage1, 1770),
    (sae_stage2, 2040),
    (sae_stage3, 1710),
    (sae_stage4, 1710 + 382),
    (rfm_dit, 715.3 + ENCODE),
    (rfm_ddt, 971.5 + ENCODE),
]


@pytest.mark.parametrize(("module", "giga"), PUBLISHED)
def test_published_sizes(module, giga):
    assert step_flops.train_flops(module.get_config()) / 1e9 == pytest.approx(giga, rel=0.011)


def test_a_frozen_encoder_is_outside_the_backward_pass():
    first, third = (step_flops.step_flops(m.get_config()) for m in (sae_stage1, sae_stage3))
    encoder = {"vit backward", "stem backward", "teacher forward"}
    assert encoder <= set(first)
    assert not encoder & set(third)


@pytest.mark.slow  # in the fast suite: the same step of two layers
@pytest.mark.parametrize("module", [rfm_dit, rfm_ddt])
def test_the_flow_step_at_full_size(module):
    """XL on cached latents: every layer costs the same, so two depths give all 28."""

    def counted(depth):
        config = module.get_config()
        config.dtype, config.batch_size = "float32", 64
        config.data.latents = "a cache"
        dit = config.model.dit
        dit.scan_layers, dit.remat = False, "none"
        dit.depth = depth if module is rfm_dit else (depth, dit.depth[1])
        mesh = sharding.make_mesh(1, jax.devices()[:1])
        with jax.set_mesh(mesh):
            program = programs.build(config, mesh)
            cost = program.step.lower(*program.arguments).cost_analysis()
        return cost["flops"] / config.batch_size

    config = module.get_config()
    config.data.latents = "a cache"
    depth = config.model.dit.depth if module is rfm_dit else config.model.dit.depth[0]
    one, two = counted(1), counted(2)
    assert one + (depth - 1) * (two - one) == pytest.approx(
        step_flops.train_flops(config), rel=0.02
    )


@pytest.mark.parametrize(
    "module",
    [
        rfm_dit,
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in (sae_stage1, sae_stage2, sae_stage3, sae_stage4)
        ),
    ],
)
def test_the_step_does_no_work_twice(module):
    """Full widths and two layers, unrolled (a loop's body would be counted once); only traced."""
    config = module.get_config()
    config.dtype, config.batch_size = "float32", 1
    for role in {"vit", "dino", "dit"} & set(config.model):
        config.model[role].scan_layers = False
    config.model.vit.depth = 2
    if "dit" in config.model:
        config.model.dit.depth, config.model.dit.remat = 2, "none"
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = programs.build(config, mesh)
        counted = program.step.lower(*program.arguments).cost_analysis()["flops"]
    # Measured 0.981 to 1.015: the compiler leaves out padding and counts norms and activations.
    assert counted == pytest.approx(step_flops.train_flops(config), rel=0.05)
