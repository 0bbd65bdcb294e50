"""The census of dtypes: what a program reduces in bfloat16 is found, wherever it stands."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dinosae_jax.perf import collectives, dtypes, hlo
from dinosae_jax.runtime import sharding

TEXT = """HloModule jit_step, num_partitions=4

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%max (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  %x.1 = bf16[] parameter(0)
  %y.1 = bf16[] parameter(1)
  ROOT %m = bf16[] maximum(%x.1, %y.1)
}

%fused (g: bf16[4096,8]) -> bf16[8] {
  %g = bf16[4096,8]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %largest = bf16[8]{0} reduce(%g, %zero), dimensions={0}, to_apply=%max
  ROOT %bias = bf16[8]{0} reduce(%g, %zero), dimensions={0}, to_apply=%add, \
metadata={op_name="jit(step)/qkv/reduce_sum"}
}

ENTRY %main (a: bf16[4096,8], b: f32[2,3]) -> f32[2,3] {
  %a = bf16[4096,8]{1,0} parameter(0)
  %b = f32[2,3]{1,0} parameter(1)
  %f = bf16[8]{0} fusion(%a), kind=kInput, calls=%fused
  %zero.1 = f32[] constant(0)
  %short = f32[2]{0} reduce(%b, %zero.1), dimensions={1}, to_apply=%add
  ROOT %r = (bf16[8]{0}, f32[2,3]{1,0}) all-reduce(%f, %b), replica_groups={}, to_apply=%add
}
"""


def test_collectives_by_dtype():
    assert dtypes.of_collectives(hlo.parse(TEXT)) == {
        ("all-reduce", "bf16"): collectives.Use(1, 16),
        ("all-reduce", "f32"): collectives.Use(1, 24),
    }


def test_long_sums_with_their_dtype_and_source():
    module = hlo.parse(TEXT)
    assert dtypes.of_sums(module, 1000) == [dtypes.Sum("bf16", 4096, 1, "jit(step)/qkv/reduce_sum")]
    assert [found.elements for found in dtypes.of_sums(module, 3)] == [3, 4096]
    assert dtypes.record(module)["long_sums"] == {"bf16": 1}
    assert dtypes.record(module)["collective_bytes"] == {
        "all-reduce bf16": 16,
        "all-reduce f32": 24,
    }


def test_the_dtypes_of_a_compiled_sum():
    mesh = sharding.make_mesh(8)

    def local(x):
        return jax.lax.psum(x.sum(0, dtype=jnp.float32), "fsdp")

    spec = PartitionSpec("fsdp")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    text = jax.jit(mapped).lower(jnp.ones((8 * 512, 16), jnp.bfloat16)).compile().as_text()
    module = hlo.parse(text)
    assert set(dtypes.of_collectives(module)) == {("all-reduce", "f32")}
    assert {found.dtype for found in dtypes.of_sums(module, 8)} == {"f32"}
