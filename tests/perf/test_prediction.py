"""The predicted time of a step: what a line of compiled text costs, and that none is lost."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dinosae_jax.perf import chips, hlo, prediction, roofline, targets

# Lines of XLA:TPU (libtpu 0.0.42) for v6e, without the fields that nothing reads.
PRODUCT = """HloModule jit_matmul, is_scheduled=true

%fused_computation (param_0: bf16[8192,2048], param_1: bf16[2048,4096]) -> bf16[8192,4096] {
  %param_0 = bf16[8192,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[2048,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8192,4096]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
dim_labels=bf_io->bf, metadata={op_name="jit(matmul)/dot_general"}
}

ENTRY %main.1 (a.1: bf16[8192,2048], b.1: bf16[2048,4096]) -> bf16[8192,4096] {
  %a.1 = bf16[8192,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[8192,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[8192,2048]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%a.1), cross_program_prefetch_index=0
  %b.1 = bf16[2048,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-done = bf16[8192,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %fusion = bf16[8192,4096]{1,0:T(8,128)(2,1)} fusion(%copy-done, %b.1), kind=kOutput, \
calls=%fused_computation, metadata={op_name="jit(matmul)/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"314632"}}
}
"""
COPY = """HloModule jit_copy

ENTRY %main.1 (a.1: f32[8192,8192]) -> f32[8192,8192] {
  %a.1 = f32[8192,8192]{1,0:T(8,128)} parameter(0)
  ROOT %copy = f32[8192,8192]{1,0:T(8,128)} copy(%a.1), \
backend_config={"window_config":{"estimated_cycles":"709504"}}
}
"""
# A scan over 12 weights; each turn reads one of them.
SCAN = """HloModule jit_scan

%slice (param_0.15: bf16[12,1024,1024], param_1.13: s32[]) -> bf16[1024,1024] {
  %param_0.15 = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.13 = s32[]{:T(128)S(6)} parameter(1)
  %constant.17 = s32[]{:T(128)} constant(0)
  %dynamic_slice.9 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.15, \
%param_1.13, %constant.17, %constant.17), dynamic_slice_sizes={1,1024,1024}
  ROOT %bitcast.12 = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%dynamic_slice.9)
}

%product (a: bf16[1024,1024], w: bf16[12,1024,1024], p: s32[]) -> bf16[1024,1024] {
  %param_1.14 = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p = s32[]{:T(128)S(6)} parameter(2)
  %fusion.9 = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%param_1.14, %p), kind=kLoop, calls=%slice
  %param_0.16 = bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %convolution.5 = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%fusion.9, %param_0.16), \
dim_labels=fb_oi->bf
  ROOT %tanh.5 = bf16[1024,1024]{0,1:T(8,128)S(1)} tanh(%convolution.5)
}

%body (state: (s32[], bf16[1024,1024], bf16[12,1024,1024])) -> (s32[], bf16[1024,1024]) {
  %state = (s32[]{:T(128)}, bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)}, \
bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %x = bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %y = bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%product, \
metadata={op_name="jit(scan)/while/body/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"8560"}}
  ROOT %tuple = (s32[]{:T(128)}, bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)}) tuple(%i, %y)
}

%condition (state.1: (s32[], bf16[1024,1024], bf16[12,1024,1024])) -> pred[] {
  %constant.14 = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.14), direction=LT
}

ENTRY %main.5 (a.1: bf16[1024,1024], w.1: bf16[12,1024,1024]) -> bf16[1024,1024] {
  %a.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %while = (s32[]{:T(128)}, bf16[1024,1024]{0,1:T(8,128)(2,1)S(1)}) while(%tuple.10), \
condition=%condition, body=%body, metadata={op_name="jit(scan)/while"}
  ROOT %r = bf16[1024,1024]{0,1:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""
KERNEL = """HloModule jit_kernel

ENTRY %main.1 (a.1: bf16[1024,512], b.1: bf16[512,256]) -> bf16[1024,256] {
  %a.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %my_kernel.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} custom-call(%a.1, %b.1), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[1024,512]{1,0}, \
bf16[512,256]{1,0}}, metadata={op_name="jit(kernel)/my_kernel/pallas_call"}, \
backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"268435456000",\
"transcendentals":"7","bytes_accessed":"12345678","remote_bytes_transferred":"0"}}}
}
"""
BRANCHES = """HloModule jit_cond

%short (p.1: bf16[8]) -> bf16[8] {
  %p.1 = bf16[8]{0} parameter(0)
  ROOT %n = bf16[8]{0} negate(%p.1), backend_config={"estimated_cycles":"1000"}
}

%long (p.2: bf16[8]) -> bf16[8] {
  %p.2 = bf16[8]{0} parameter(0)
  ROOT %e = bf16[8]{0} exponential(%p.2), backend_config={"estimated_cycles":"3500"}
}

ENTRY %main.4 (c: s32[], p: bf16[8]) -> bf16[8] {
  %c = s32[] parameter(0)
  %p = bf16[8]{0} parameter(1)
  ROOT %cond = bf16[8]{0} conditional(%c, %p, %p), branch_computations={%short, %long}
}
"""
# As XLA:GPU writes what it hands to libraries, and a fusion that updates a stack in place.
GPU = """HloModule jit_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%store (stack: bf16[24,1024,1024], new: bf16[1024,1024], at: s32[]) -> bf16[24,1024,1024] {
  %stack = bf16[24,1024,1024]{2,1,0} parameter(0)
  %new = bf16[1024,1024]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %one = bf16[1,1024,1024]{2,1,0} bitcast(%new)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[24,1024,1024]{2,1,0} dynamic-update-slice(%stack, %one, %at, %zero, %zero)
}

ENTRY %main.9 (a: bf16[8192,8192], b: bf16[8192,8192], g: f32[1000]) -> bf16[8192,8192] {
  %a = bf16[8192,8192]{1,0} parameter(0)
  %b = bf16[8192,8192]{1,0} parameter(1)
  %g = f32[1000]{0} parameter(2)
  %q = bf16[32,256,16,72]{3,2,1,0} parameter(3)
  %s = bf16[24,1024,1024]{2,1,0} parameter(4)
  %n = bf16[1024,1024]{1,0} parameter(5)
  %i = s32[] parameter(6)
  %image = bf16[32,64,64,128]{3,2,1,0} parameter(7)
  %kernel = bf16[256,3,3,128]{3,2,1,0} parameter(8)
  %gemm = (bf16[8192,8192]{1,0}, s8[33554432]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %fmha = (bf16[32,16,256,72]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{\
"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["32","16","256","256"]}}}
  %conv = (bf16[32,64,64,256]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward"
  %stored = bf16[24,1024,1024]{2,1,0} fusion(%s, %n, %i), kind=kLoop, calls=%store
  ROOT %ar = f32[1000]{0} all-reduce(%g), replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def predict(text, target="v6e:1x1"):
    return prediction.predict(hlo.parse(text), target)


def test_a_product_is_at_83_to_88_percent_of_the_peak_by_the_compilers_estimate():
    found = predict(PRODUCT)
    assert 0.83 <= found.mfu(2 * 8192 * 2048 * 4096, 918e12) <= 0.88
    (cost,) = found.costs
    assert (cost.kind, cost.flops) == (prediction.PRODUCTS, 2 * 8192 * 2048 * 4096)
    assert cost.bytes == 2 * (2048 * 4096 + 8192 * 4096)  # the other factor is in VMEM
    assert cost.bound == pytest.approx(cost.flops / 918e12)


def test_a_copy_is_near_the_bandwidth():
    (cost,) = predict(COPY).costs
    assert (cost.kind, cost.bytes) == (prediction.COPIES, 2 * 4 * 8192**2)
    assert 0.75 <= cost.bound / cost.seconds <= 0.9


def test_a_scan_counts_its_body_once_per_iteration():
    found = predict(SCAN)
    assert found.seconds == pytest.approx(12 * 8560 / 1.75e9)
    (cost,) = found.costs
    assert (cost.kind, cost.runs, cost.flops) == (prediction.PRODUCTS, 12, 12 * 2 * 1024**3)
    assert cost.bytes == 12 * 2 * 1024**2  # of all weights one a turn; the rest is in VMEM


def test_a_kernel_counts_by_its_own_estimate_and_both_sums_are_there():
    found = predict(KERNEL)
    share = prediction.EFFICIENCY["attention"]
    assert found.seconds == pytest.approx(268435456000 / (share * 918e12))
    assert found.seconds_without_kernels == 0
    quick = predict(KERNEL.replace('"flops":"268435456000"', '"flops":"2"'))
    assert quick.seconds == pytest.approx(
        12345678 / (prediction.EFFICIENCY["memory"] * chips.TPUS["v6e"].memory)
    )


def test_a_kernel_that_is_silent_counts_by_its_arrays():
    text = KERNEL.replace("cost_estimate", "nothing")
    found = predict(text)
    assert (found.silent_kernels, predict(KERNEL).silent_kernels) == (1, 0)
    (cost,) = found.costs
    assert (cost.kind, cost.flops) == (prediction.KERNELS, 0)
    assert cost.bytes == 2 * (1024 * 512 + 512 * 256 + 1024 * 256)


def test_of_branches_the_longest_counts():
    found = predict(BRANCHES)
    assert [cost.instruction.name for cost in found.costs] == ["e"]
    assert found.seconds == pytest.approx(2e-6)


def test_a_gpu_by_roofline_and_libraries_by_their_shapes():
    costs = {cost.instruction.name: cost for cost in predict(GPU, "h200:8").costs}
    assert costs["gemm"].flops == 2 * 8192**3
    assert costs["gemm"].bytes == 3 * 2 * 8192**2  # without the workspace
    assert costs["gemm"].seconds == pytest.approx(2 * 8192**3 / 791.2e12, rel=1e-3)
    assert costs["fmha"].flops == 4 * 32 * 16 * 256 * 256 * 72
    assert costs["fmha"].kind == prediction.ATTENTION
    assert costs["conv"].flops == 2 * 32 * 64 * 64 * 256 * 9 * 128
    assert costs["conv"].kind == prediction.PRODUCTS
    assert costs["stored"].bytes == 2 * 2 * 1024**2 + 4  # reads and writes one, not the stack
    assert costs["ar"].bytes == 2 * 4000 * 3 // 4  # a ring of four, there and back
    assert costs["ar"].seconds == pytest.approx(6000 / 450e9)


def test_a_batched_product_of_cublas_is_attention():
    text = GPU.replace('"lhs_batch_dimensions":[]', '"lhs_batch_dimensions":["0"]')
    kinds = {cost.instruction.name: cost.kind for cost in predict(text, "h200:8").costs}
    assert kinds["gemm"] == prediction.ATTENTION


def test_convolutions_count_the_taps_that_meet_an_input():
    text = "HloModule m\n\nENTRY %main (x: f32[2,8,8,4], k: f32[{k}]) -> f32[{out}] {{\n"
    text += "  %x = f32[2,8,8,4]{{3,2,1,0}} parameter(0)\n  %k = f32[{k}]{{0}} parameter(1)\n"
    text += "  ROOT %c = f32[{out}]{{0}} convolution(%x, %k), window={{{window}}}, "
    text += "dim_labels=b01f_01io->b01f\n}}\n"
    same = text.format(k="3,3,4,5", out="2,8,8,5", window="size=3x3 pad=1_1x1_1")
    transposed = text.format(
        k="2,2,4,5", out="2,16,16,5", window="size=2x2 pad=1_1x1_1 lhs_dilate=2x2"
    )

    def flops(source):
        module = hlo.parse(source)
        (product,) = roofline.products(module.computations["main"]["c"], module, "main")
        return product.flops

    assert flops(same) == 2 * 2 * 5 * 4 * (3 * 8 - 2) ** 2
    assert flops(transposed) == 2 * 2 * 5 * 4 * 16**2  # one tap per output on each side


@pytest.mark.parametrize(
    ("target", "links"),
    [("v6e:1x1", 1), ("v6e:2x4", 2), ("v6e:16x16", 4), ("v5p:2x2x4", 3), ("v5p:4x4x4", 6)],
)
def test_links_of_a_slice(target, links):
    assert chips.link_bandwidth(target) == links * 100e9


def test_a_cpu_is_not_predicted():
    assert predict(COPY, "cpu:8") is None


def test_loops_are_named_with_their_iterations():
    (line,) = prediction.describe_loops(predict(SCAN))
    assert "in 12 turns of 0.005 ms" in line
    assert line.endswith("  jit(scan)/while")


def test_the_costliest_instructions_are_named():
    (line,) = prediction.describe(predict(PRODUCT).costliest(1))
    assert "weight products" in line
    assert line.endswith("fusion: bf16[8192,4096]  jit(matmul)/dot_general")


def compiled(function, *arguments):
    """Text of a function compiled for one v6e."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("NOT CHECKED: the TPU compiler is missing; pip install -e '.[test,plan]'")
    device = targets.devices_of("v6e:1x1")[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
    with jax.default_matmul_precision(None):
        return jax.jit(function).lower(*shapes).compile().as_text()


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.slow
def test_the_installed_compiler_says_the_same_of_a_product():
    text = compiled(jnp.matmul, bf16(8192, 2048), bf16(2048, 4096))
    assert 0.8 <= predict(text).mfu(2 * 8192 * 2048 * 4096, 918e12) <= 0.92


def test_the_installed_compiler_says_the_same_of_a_scan():
    def turn(x, w):
        return jnp.tanh(x @ w), None

    text = compiled(
        lambda x, w: jax.lax.scan(turn, x, w)[0], bf16(1024, 1024), bf16(12, 1024, 1024)
    )
    products = [c for c in predict(text).costs if c.kind == prediction.PRODUCTS]
    assert sum(cost.flops for cost in products) == 12 * 2 * 1024**3
