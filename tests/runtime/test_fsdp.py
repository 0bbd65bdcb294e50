"""Where parameters live: the rule, and that a split step is the whole step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import rfm_ddt, rfm_dit
from dinosae_jax.models import registry
from dinosae_jax.perf import collectives
from dinosae_jax.runtime import fsdp, jit, sharding
from dinosae_jax.train import flow_step, flow_task
from dinosae_jax.train.jit_step import jit_step

CLEAN = {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize(
    ("shape", "stacked", "ways", "axis"),
    [
        ((28, 1152, 6144), True, 16, 2),  # the largest
        ((28, 1152, 3456), True, 8, 1),  # 3456 / 8 is not a multiple of 128, 1152 / 8 is one of 8
        ((28, 1152, 3456), True, 128, 2),
        ((28, 3072, 1152), True, 256, 1),  # 1152 = 2^7 * 9
        ((2, 2048, 10922), True, 16, 1),  # 10922 = 2 * 43 * 127
        ((1001, 1152), False, 16, 1),
        ((28, 1152, 1152), True, 28, None),  # never the depth
        ((28, 6912), True, 8, None),  # under 1 MiB
        ((28, 1152, 3456), True, 1, None),
    ],
)
def test_the_rule(shape, stacked, ways, axis):
    expected = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
    assert fsdp.partition_rule(shape, 4, stacked, ways) == expected


@functools.cache
def shapes_of(flow):
    config = flow.get_config()
    config.dtype = "float32"
    stage = flow_task.step_spec(config)
    draw = functools.partial(registry.init_dit, stage.dit)
    return jax.eval_shape(draw, jax.eval_shape(lambda: jax.random.PRNGKey(0)))


@pytest.mark.parametrize("ways", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("flow", [rfm_dit, rfm_ddt])
def test_no_large_leaf_of_the_full_networks_is_copied(flow, ways):
    shapes = shapes_of(flow)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        axes = fsdp.partition_rule(leaf.shape, 4, fsdp.is_stacked(path), ways)
        assert axes or leaf.size * 4 < 1 << 20, (path, leaf.shape)


def test_a_large_leaf_that_cannot_be_split_is_refused():
    mesh = sharding.make_mesh(8, jax.devices()[:8])
    leaf = {"head": {"kernel": jax.ShapeDtypeStruct((1001, 1001), jnp.float32)}}
    with pytest.raises(ValueError, match=r"mesh.fsdp.*got 8 for head/kernel \[1001, 1001\]"):
        sharding.shardings(leaf, mesh)


def test_without_a_mesh_nothing_happens():
    tree = {"kernel": jnp.ones((512, 1024))}
    assert fsdp.gather_block(tree, 4) is tree
    assert fsdp.gather_unstacked(tree) is tree
    assert fsdp.shard_by_example(tree["kernel"]) is tree["kernel"]


@pytest.mark.parametrize("flow", [rfm_dit, pytest.param(rfm_ddt, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_split_step_is_the_whole_step(flow, monkeypatch):
    monkeypatch.setattr(fsdp, "SMALLEST_SHARDED_BYTES", 1 << 10)
    config = flow.get_config("tiny")
    config.dtype, config.batch_size = "float32", 16
    two = flow is rfm_ddt
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 2}
    config.model.dit.update({k: (v, v) if two else v for k, v in sizes.items()})
    config.model.dit.remat = "dots"
    stage = flow_task.step_spec(config)
    drawn = jax.device_get(
        jit.jit_once(functools.partial(registry.init_dit, stage.dit))(jax.random.PRNGKey(0))
    )
    random = np.random.default_rng(0)
    batch = {
        "latent": random.normal(size=(16, 16, 64)).astype(np.float32),
        "label": np.arange(16, dtype=np.int32) % 10,
    }
    after = {}
    for ways in (1, 4):
        mesh = sharding.make_mesh(ways, jax.devices()[:8])
        create = functools.partial(flow_step.create_state, stage, seed=0)
        places = sharding.shardings(jax.eval_shape(create, {"dit": drawn}), mesh)
        state = jit.jit_once(create, out_shardings=places)({"dit": drawn})
        arguments = (state, {}, sharding.put_batch(batch, mesh), flow_step.hyperparameters(config))
        compiled = jit_step(flow_step.train_step, stage, mesh).lower(*arguments).compile()
        kinds = set(collectives.census(compiled.as_text()))
        # XLA:CPU makes no reduce-scatter: it sums and slices.
        assert kinds <= CLEAN and ("all-gather" in kinds) == (ways > 1), kinds
        after[ways] = jax.device_get(compiled(*arguments))
    assert after[4].metrics["loss"].total == pytest.approx(after[1].metrics["loss"].total, 1e-6)
    # Sums are taken in another order; Adam's first step is the sign of the gradient times the
    # rate, so gradients that are nothing but rounding may differ by it: the moments are compared.
    ours, theirs = (jax.tree.leaves(after[n].opt["dit"].mu) for n in (4, 1))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))
