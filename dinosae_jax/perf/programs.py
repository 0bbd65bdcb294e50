"""The training steps and the sampler from a config alone: what `plan` and `bench` compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from dinosae_jax.flow import samplers
from dinosae_jax.inference import sampling_program
from dinosae_jax.models import autoencoder, flops, registry
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import autoencoder_step, autoencoder_task, flow_step, flow_task
from dinosae_jax.train.jit_step import jit_step

Tree = Any
Variables = dict[str, dict[str, Tree]]


class Kind(NamedTuple):
    """How the step of one kind of training is built.

    Attributes:
      make_spec: config -> its static part.
      draw: (spec, config, key) -> random variables of every role.
      trained: roles in the state, where the spec has them.
      step: module with create_state, train_step and hyperparameters.
      labels: whether a batch holds labels.
    """

    make_spec: Callable[[ml_collections.ConfigDict], Any]
    draw: Callable[[Any, ml_collections.ConfigDict, jax.Array], Variables]
    trained: tuple[str, ...]
    step: Any
    labels: bool


class Program(NamedTuple):
    """A training step before it is compiled.

    Attributes:
      step: jitted (state, frozen, batch, hyperparams) -> state.
      arguments: shapes, dtypes and shardings of its four arguments.
      make: key -> (state, frozen), random.
      hyperparams: () -> the fourth argument.
    """

    step: Any
    arguments: tuple[Tree, Tree, Tree, Tree]
    make: Callable[[jax.Array], tuple[Any, Variables]]
    hyperparams: Callable[[], Tree]


class Sampler(NamedTuple):
    """A sampler before it is compiled.

    Attributes:
      step: jitted (variables, noise, labels, scales) -> images.
      arguments: shapes, dtypes and shardings of its four arguments.
    """

    step: Any
    arguments: tuple[Tree, Tree, Tree, Tree]


def _draw_autoencoder(spec: Any, config: ml_collections.ConfigDict, key: jax.Array) -> Variables:
    return autoencoder_task.draw_variables(spec, key, config.data.image_size)


def _draw_flow(spec: Any, config: ml_collections.ConfigDict, key: jax.Array) -> Variables:
    variables = autoencoder.init(spec.modules, key, config.data.image_size)
    del variables["decoder"]  # not a part of the step
    return {**variables, "dit": registry.init_dit(spec.dit, jax.random.fold_in(key, 3))}


AUTOENCODER = Kind(
    autoencoder_task.step_spec,
    _draw_autoencoder,
    ("stem", "decoder", "disc_heads"),
    autoencoder_step,
    labels=False,
)
FLOW = Kind(flow_task.step_spec, _draw_flow, ("dit",), flow_step, labels=True)


def build(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Program:
    """The step of a training config on a mesh, whose devices need not be present.

    Args:
      config: config of one stage, its dtype resolved.
      mesh: devices, or a topology's descriptions of devices.

    Raises:
      ValueError: where a micro-batch does not divide over the devices.
    """
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    kind = FLOW if "flow" in config else AUTOENCODER
    spec = kind.make_spec(config)
    trained = set(kind.trained) & {*config.trainable, "disc_heads"}

    def make(key: jax.Array) -> tuple[Any, Variables]:
        variables = kind.draw(spec, config, key)
        ours = {role: tree for role, tree in variables.items() if role in trained}
        frozen = {role: tree for role, tree in variables.items() if role not in trained}
        frozen = precision.frozen(frozen, config.dtype)
        return kind.step.create_state(spec, ours, config.seed), frozen

    state, frozen = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.PRNGKey(0)))
    hyperparams = jax.eval_shape(lambda: kind.step.hyperparameters(config))
    everywhere = sharding.replicated(mesh)
    return Program(
        jit_step(kind.step.train_step, spec, mesh),
        (
            _place(state, sharding.shardings(state, mesh)),
            _place(frozen, jax.tree.map(lambda _: everywhere, frozen)),
            _batch(config, mesh, kind.labels),
            _place(hyperparams, jax.tree.map(lambda _: everywhere, hyperparams)),
        ),
        make,
        functools.partial(kind.step.hyperparameters, config),
    )


def build_sampler(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Sampler:
    """The sampler of a flow's config, as `Generator.sample` calls it with `batch_size` labels.

    Args:
      config: config of the flow, its dtype resolved; `sampling` has the settings.
      mesh: devices, or a topology's descriptions of devices.
    """
    sharding.check_batch(config.batch_size, 1, mesh)
    spec = flow_task.step_spec(config)
    networks = sampling_program.Networks(
        spec.modules, spec.dit, spec.path, spec.radius, spec.times.shift
    )
    chosen = config.sampling
    sampling = sampling_program.Sampling(
        chosen.sampler,
        chosen.steps,
        chosen.guidance != 1.0,
        tuple(chosen.interval),
        sampling_program.decode_parts(config.batch_size // mesh.size),
    )

    def make(key: jax.Array) -> Variables:
        dit = registry.init_dit(spec.dit, jax.random.fold_in(key, 3))
        drawn = autoencoder.init(spec.modules, key, config.data.image_size)
        variables = {"dit": dit, "decoder": drawn["decoder"]}
        return precision.frozen(variables, config.dtype)

    variables = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.PRNGKey(0)))
    split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    b, n, d = config.batch_size, spec.dit.input_size**2, spec.dit.in_channels
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return Sampler(
        sampling_program.compile_generate(networks, sampling),
        (
            _place(variables, jax.tree.map(lambda _: everywhere, variables)),
            jax.ShapeDtypeStruct((b, n, d), jnp.float32, sharding=split),
            jax.ShapeDtypeStruct((b,), jnp.int32, sharding=split),
            {"guidance": number, "decode_radius": number},
        ),
    )


def sampler_flops(config: ml_collections.ConfigDict) -> int:
    """FLOPs of one image of a sampler: its network calls and the decoder."""
    spec = flow_task.step_spec(config)
    calls = samplers.SAMPLERS[config.sampling.sampler].evaluations * config.sampling.steps
    calls *= 1 if config.sampling.guidance == 1.0 else 2
    side = spec.dit.input_size
    decoder = flops.decoder_flops(spec.modules.decoder, side, side)
    return calls * flops.forward_flops(spec.dit) + decoder


def _place(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings
    )


def _batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, labels: bool) -> Tree:
    split, b, side = sharding.batch_sharding(mesh), config.batch_size, config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8, sharding=split)}
    if config.data.get("latents"):  # from a cache in bfloat16
        shape = (b, (side // PATCH_SIZE) ** 2, config.model.vit.embed_dim)
        batch = {"latent": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)}
    if labels:
        batch["label"] = jax.ShapeDtypeStruct((b,), jnp.int32, sharding=split)
    return batch


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device of a compiled program, as its compiler planned them.

    Returns:
      arguments, temporaries, outputs, aliased (arguments whose memory an output reuses) and peak,
      their sum without aliased. (XLA:CPU's own peak leaves temporaries out; XLA:TPU's equals this
      sum.)
    """
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs, aliased = analysis.output_size_in_bytes, analysis.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "outputs": outputs,
        "aliased": aliased,
        "peak": arguments + temporaries + outputs - aliased,
    }
