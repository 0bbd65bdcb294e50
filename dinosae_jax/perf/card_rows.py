"""What `configs/bench.py:card` measures: each row is a function of the config, run in a process.

A row gives lines: a quantity, what was measured, what was predicted (None where nothing was) and
the unit. Predictions of time and memory are read off the program that the card's own compiler made
(`perf.prediction`, `programs.memory`); peaks are 989 TFLOP/s, which the manufacturer states for
bfloat16 on an H100 or H200, and 790, which large products reach.
"""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dinosae_jax.inference import encoding, generator
from dinosae_jax.models import dit_blocks, flops, layers
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.perf import hlo, loader_speed, prediction, programs, step_speed, targets
from dinosae_jax.runtime import hardware, precision, sharding
from dinosae_jax.train import step_flops
from dinosae_jax.weights import integrity

PEAKS = (989, 790)  # TFLOP/s
GIB = 2**30
LOADER_PER_CORE = 230.0  # images/s: what was measured on another machine
PRECISIONS = {  # title -> dtype of the factors, precision of the product
    "float32": (jnp.float32, "highest"),
    "float32 as XLA takes it (TF32)": (jnp.float32, "default"),
    "bfloat16": (jnp.bfloat16, "default"),
}
BIAS_GOAL = 1e-3  # relative error of a sum in float32, with the output rounded to bfloat16 before


class Line(NamedTuple):
    """One measured quantity of a row."""

    quantity: str
    measured: float | None
    predicted: float | None
    unit: str
    note: str = ""


Row = Callable[[ml_collections.ConfigDict], list[Line]]


def machine(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The devices, as a child process sees them."""
    devices = jax.devices()
    return {
        "card": devices[0].device_kind,
        "devices": len(devices),
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def step(name: str, config: ml_collections.ConfigDict) -> list[Line]:
    """Speed, utilisation and memory of one training step on synthetic batches."""
    ready = step_speed.compile_step(config, name)
    seconds = step_speed.time_step(ready, config)
    image_flops, images = step_flops.train_flops(ready.stage), ready.stage.batch_size
    peak = hardware.peak_memory() / GIB  # before the text of the program takes the host's
    return [
        *_speed(seconds, _predicted(ready.compiled), images, image_flops),
        Line("peak memory", peak, programs.memory(ready.compiled)["peak"] / GIB, "GiB"),
        Line("compilation", ready.seconds, None, "s"),
    ]


def repeat(name: str, config: ml_collections.ConfigDict) -> list[Line]:
    """Two runs of one step from the same state: how many arrays differ in a bit."""
    ready = step_speed.compile_step(config, name)
    with jax.set_mesh(ready.mesh):
        first, second = (_state_bits(ready) for _ in range(2))
    differing = sum(int(ours != theirs) for ours, theirs in zip(first, second, strict=True))
    return [Line(f"arrays of {len(first)} that differ", differing, 0, "")]


def _state_bits(ready: step_speed.Ready) -> list[int]:
    """A checksum of the bits of each array of the state after one step."""
    state, others = step_speed.synthetic(ready.program, ready.stage.seed)
    return list(integrity.checksums(ready.compiled(state, *others)).values())


def sampler(name: str, config: ml_collections.ConfigDict) -> list[Line]:
    """Speed of the compiled sampler of a flow, noise to images."""
    stage = precision.resolve_config(config.stages[name])
    mesh = sharding.make_mesh()
    stage.batch_size = config.card.sampler.batch_per_device * mesh.size
    stage.sampling.steps = config.card.sampler.steps
    drawn = generator.random_generator(stage, mesh)
    program = programs.build_sampler(stage, mesh)
    started = time.perf_counter()
    compiled = program.step.lower(*program.arguments).compile()
    compilation = time.perf_counter() - started
    place = sharding.batch_sharding(mesh)
    labels = jax.device_put(np.zeros(stage.batch_size, np.int32), place)
    noise = drawn.noise(jax.random.PRNGKey(0), np.arange(stage.batch_size))
    everywhere = sharding.replicated(mesh)
    numbers = {"guidance": stage.sampling.guidance, "decode_radius": drawn.convention.decode_radius}
    scales = {k: jax.device_put(np.float32(v), everywhere) for k, v in numbers.items()}
    variables = {role: drawn.variables[role] for role in program.arguments[0]}
    draw = functools.partial(compiled, variables, noise, labels, scales)
    seconds = step_speed.call_seconds(draw, config.repeats)
    image_flops = programs.sampler_flops(stage)
    return [
        *_speed(seconds, _predicted(compiled), stage.batch_size, image_flops),
        Line(
            "peak memory",
            hardware.peak_memory() / GIB,
            programs.memory(compiled)["peak"] / GIB,
            "GiB",
        ),
        Line("compilation", compilation, None, "s"),
    ]


def encode(config: ml_collections.ConfigDict) -> list[Line]:
    """Speed of encoding images to tokens."""
    stage = precision.resolve_config(config.stages["rfm_dit"])
    mesh = sharding.make_mesh()
    drawn = generator.random_generator(stage, mesh)
    modules, side = drawn.networks.modules, stage.data.image_size
    size = config.card.encode.batch_per_device * mesh.size
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (size, side, side, 3)).astype(np.uint8)
    placed = jax.device_put(image, sharding.batch_sharding(mesh))
    program: Any = encoding.compiled_encode(modules)
    compiled = program.lower(drawn.variables, placed).compile()
    seconds = step_speed.call_seconds(lambda: compiled(drawn.variables, placed), config.repeats)
    tokens = side // PATCH_SIZE
    image_flops = flops.vit_flops(modules.vit, tokens, tokens)
    image_flops += flops.stem_flops(modules.stem, side, side)
    return _speed(seconds, _predicted(compiled), size, image_flops)


def attention(config: ml_collections.ConfigDict) -> list[Line]:
    """Forward and backward pass of attention alone, by XLA's own code and by cuDNN."""
    lines = []
    for name, (b, n, h, d) in config.card.attention.shapes.items():
        work = 3.5 * 4 * b * h * n * n * d  # 2 products forward, 5 backward
        for variant in config.card.attention.variants:
            title = f"{name} [{b}, {n}, {h}, {d}], {variant}"
            try:
                seconds = _attention_seconds((b, n, h, d), variant, config.repeats)
            except Exception as error:  # the variant cannot do this shape here
                lines.append(Line(title, None, None, "ms", short(error)))
                continue
            bound = 1e3 * work / (PEAKS[0] * 1e12)
            lines.append(Line(title, 1e3 * seconds, bound, "ms", "predicted: at the peak"))
    return lines


def _attention_seconds(shape: tuple[int, int, int, int], variant: Any, repeats: int) -> float:
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    query, key, value, cotangent = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        attend = functools.partial(jax.nn.dot_product_attention, implementation=variant)
        mixed, pull = jax.vjp(attend, q, k, v)
        return mixed, pull(g)

    return step_speed.call_seconds(lambda: both(query, key, value, cotangent), repeats)


def heads(config: ml_collections.ConfigDict) -> list[Line]:
    """Relative error of the heads' products of float32 numbers against float64, by precision."""
    lines = []
    for name, (rows, inner, outer) in config.card.heads.items():
        random = np.random.default_rng(0)
        left = random.standard_normal((rows, inner), np.float32)
        right = random.standard_normal((inner, outer), np.float32)
        exact = left.astype(np.float64) @ right.astype(np.float64)
        for title, (dtype, level) in PRECISIONS.items():
            options = {"precision": level, "preferred_element_type": jnp.float32}
            product = jax.jit(functools.partial(jnp.matmul, **options))
            placed = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
            error = np.asarray(product(*placed), np.float64) - exact
            relative = float(np.linalg.norm(error) / np.linalg.norm(exact))
            lines.append(Line(f"{name} [{rows}, {inner}, {outer}], {title}", relative, None, ""))
            seconds = step_speed.call_seconds(functools.partial(product, *placed), config.repeats)
            lines.append(Line(f"{name}, {title}, time", 1e3 * seconds, None, "ms"))
    return lines


def bias(config: ml_collections.ConfigDict) -> list[Line]:
    """Relative error of bias gradients of bfloat16 layers against sums in float64."""
    sizes = config.card.bias
    gated = dit_blocks.SwiGLU(2 * sizes.dense[-1], "torch", jnp.bfloat16)
    cases = {
        "SwiGLU's last product": (gated, tuple(sizes.dense), ("w3", "bias")),
        "3x3 convolution": (
            layers.Conv2d(sizes.conv[-1], dtype=jnp.bfloat16),
            tuple(sizes.conv),
            ("bias",),
        ),
    }
    lines = []
    for name, (module, shape, path) in cases.items():
        error = _bias_error(module, shape, path)
        lines.append(Line(f"{name} {list(shape)}", error, BIAS_GOAL, ""))
    return lines


def _bias_error(module: Any, shape: tuple[int, ...], path: tuple[str, ...]) -> float:
    """|g - g64| / |g64| of the bias under `path`, which the layer adds to its output."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    variables = jax.jit(module.init)(keys[2], x[:1])

    @jax.jit
    def gradient(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda tree: module.apply(tree, x), variables)[1](cotangent)[0]["params"]

    found: Any = gradient(variables, x, cotangent)
    for name in path:
        found = found[name]
    exact = np.asarray(cotangent, np.float32).reshape(-1, shape[-1]).sum(0, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def loader(config: ml_collections.ConfigDict) -> list[Line]:
    """Training batches from JPEGs of 500x375, cut by ADM's centre crop of 256 pixels."""
    settings = config.card.loader.copy_and_resolve_references()
    cores = os.cpu_count() or 1
    settings.data.threads = settings.data.threads or cores
    with tempfile.TemporaryDirectory() as folder:
        written = loader_speed.write_jpegs(pathlib.Path(folder), settings.jpegs)
        settings.data.source = f"folder:{written}"
        rate = loader_speed.read_batches(settings)
    alone = loader_speed.crop_jpegs(settings)
    return [
        Line(f"{settings.data.threads} threads", rate, LOADER_PER_CORE * cores, "images/s"),
        Line("one core, decoding and crop alone", alone, LOADER_PER_CORE, "images/s"),
    ]


ROWS: Mapping[str, Row] = {
    **{name: functools.partial(step, name) for name in ("rfm_dit", "rfm_ddt")},
    **{f"sae_stage{n}": functools.partial(step, f"sae_stage{n}") for n in (1, 2, 3, 4)},
    "sample_dit": functools.partial(sampler, "rfm_dit"),
    "sample_ddt": functools.partial(sampler, "rfm_ddt"),
    "encode": encode,
    "attention": attention,
    "heads": heads,
    "bias": bias,
    "repeat_dit": functools.partial(repeat, "rfm_dit"),
    "repeat_sae": functools.partial(repeat, "sae_stage2"),
    "loader": loader,
}


def compile_ahead(name: str, config: ml_collections.ConfigDict) -> None:
    """Compiles the step of a row into the cache, for a later process."""
    if name in config.stages:
        step_speed.compile_step(config, name)


def _speed(seconds: float, predicted: float | None, images: int, image_flops: int) -> list[Line]:
    """Time, images/s and utilisation of a program that does `images` images."""
    devices = jax.device_count()

    def tflops(duration: float) -> float:
        return image_flops * images / devices / duration / 1e12

    def line(quantity: str, unit: str, scale: Callable[[float], float]) -> Line:
        return Line(quantity, scale(seconds), scale(predicted) if predicted else None, unit)

    lines = [
        line(f"time at batch {images}", "ms", lambda duration: 1e3 * duration),
        line("speed", "images/s", lambda duration: images / duration),
    ]
    for peak in PEAKS:
        share = functools.partial(lambda peak, s: 100 * tflops(s) / peak, peak)
        lines.append(line(f"of {peak} TFLOP/s", "%", share))
    return lines


def _predicted(compiled: Any) -> float | None:
    """Seconds by the roofline of the compiled program, or None (a CPU, or text of a new form)."""
    kinds = {gpu.kind: name for name, gpu in targets.GPUS.items()}
    name = kinds.get(jax.devices()[0].device_kind)
    if name is None:
        return None
    try:
        found = prediction.predict(hlo.parse(compiled.as_text()), f"{name}:1")
    except Exception:  # what was measured must not be lost with a prediction
        traceback.print_exc()
        return None
    return found.seconds if found else None


def short(error: BaseException) -> str:
    """The first line of an error, of its type where it has none."""
    return ((str(error).strip() or type(error).__name__).splitlines()[0])[:160]
