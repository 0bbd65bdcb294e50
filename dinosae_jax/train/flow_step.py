"""One training step of the flow: Riemannian flow matching on the product of spheres.

    image -> frozen encoder -> z -> sphere of radius R -> geodesic to noise -> x_t, velocity
    (x_t, t, label) -> diffusion transformer -> squared error of the tangent part

A batch holds images, or latents that were encoded before (`data.latents`); everything after z is
the same. The static part is a `StepSpec`; hyperparameters are arguments, as in `autoencoder_step`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from dinosae_jax.data.latents import latent_record
from dinosae_jax.flow import matching, schedule
from dinosae_jax.models import autoencoder, dit
from dinosae_jax.runtime import fsdp
from dinosae_jax.train import accumulate, optim
from dinosae_jax.train import state as state_lib

Tree = Any
Variables = dict[str, dict[str, Tree]]
METRICS = ("loss", "tangential", "radial", "grad_norm", "learning_rate")


class Times(NamedTuple):
    """The distribution of training times, arguments of `schedule.draw_times`."""

    distribution: str
    mu: float
    sigma: float
    shift: float
    max_time: float


class StepSpec(NamedTuple):
    """The static part of a flow's training; hashable, the key of the compiled step.

    Attributes:
      modules: the autoencoder's modules.
      dit: LightningDiT or DiTDH.
      path: a name in `matching.PATHS`.
      radius: radius of the flow's sphere.
      times: distribution of the training times.
      jacobi: weighting of the loss, see `matching.loss`; '' for none.
      accumulation: micro-batches per update.
      matmul_precision: of products of float32 factors, but for parts that have their own.
    """

    modules: autoencoder.AutoencoderModules
    dit: Any
    path: str
    radius: float
    times: Times
    jacobi: str
    accumulation: int
    matmul_precision: str = "default"


class Draws(NamedTuple):
    """The random part of an example: noise x1 [b, n, d], time [b], label after dropout [b]."""

    noise: jax.Array
    time: jax.Array
    label: jax.Array


def hyperparameters(config: Any) -> dict[str, Any]:
    """The hyperparameters of a flow, an argument of the compiled step.

    Args:
      config: model.dit.class_dropout_prob, flow.radial_weight, optimizer, ema, steps.
    """
    return {
        "label_dropout": jnp.float32(config.model.dit.class_dropout_prob),
        "radial_weight": jnp.float32(config.flow.radial_weight),
        "optimizer": optim.hyperparameters(config.optimizer, config.steps),
        "ema": jnp.float32(config.ema),
    }


def split_bases(params: Tree) -> tuple[Tree, Tree]:
    """Parameters that are trained, and the fixed bases (`dit.FIXED_BASES`), each nested.

    The position table and the Fourier frequencies stay at their values: the references mark them
    as not trainable, and that is the form whose trainable parameters are counted (677,543,296 for
    LightningDiT-XL). RAE's training script trains them by accident: its `requires_grad_(True)` on
    the whole model undoes the mark.
    """
    flat = traverse_util.flatten_dict(params)
    bases = {path: leaf for path, leaf in flat.items() if path[-1] in dit.FIXED_BASES}
    trained = {path: leaf for path, leaf in flat.items() if path not in bases}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(bases)


def join_bases(trained: Tree, bases: Tree) -> Tree:
    """The inverse of `split_bases`."""
    flat = {**traverse_util.flatten_dict(trained), **traverse_util.flatten_dict(bases)}
    return traverse_util.unflatten_dict(flat)


def create_state(spec: StepSpec, variables: Variables, seed: int) -> state_lib.TrainState:
    """The state at step 0.

    Args:
      spec: the flow's static part.
      variables: role 'dit'.
      seed: seed of the run's key.
    """
    params = {"dit": variables["dit"]["params"]}
    opt = {"dit": optim.init(split_bases(params["dit"])[0])}
    return state_lib.create(params, {"dit": {}}, opt, METRICS, seed, ("dit",))


def train_step(
    spec: StepSpec,
    state: state_lib.TrainState,
    frozen: Variables,
    batch: Mapping[str, jax.Array],
    hyperparams: Mapping[str, Any],
) -> state_lib.TrainState:
    """One update of the diffusion transformer; a step that is not finite changes nothing.

    Args:
      spec: the flow's static part.
      state: the current state.
      frozen: variables of stem and vit; not read where the batch holds latents.
      batch: 'label' int32 [b], and 'image' uint8 [b, h, w, 3], or 'latent' [b, n, d], or
        'direction' int8 [b, n, d] with 'norm' float16 [b, n].
      hyperparams: from `hyperparameters`.

    Returns:
      The next state; `step` and the count of skipped steps advance in any case.
    """
    index = fsdp.shard_by_example(jnp.arange(batch["label"].shape[0]))
    one = functools.partial(gradients, spec, state, frozen, hyperparams)
    grads, scalars = accumulate.mean_over_micro_batches(one, (batch, index), spec.accumulation)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(scalars["loss"])

    trained, bases = split_bases(state.params["dit"])
    trained, opt = optim.update(
        grads, state.opt["dit"], trained, state.step, hyperparams["optimizer"], norm
    )
    ema, _ = split_bases(state.ema["dit"])
    ema = state_lib.update_ema(ema, trained, hyperparams["ema"])
    scalars |= {
        "grad_norm": norm,
        "learning_rate": optim.learning_rate(state.step, hyperparams["optimizer"]),
    }
    updated = state.replace(  # type: ignore[attr-defined]
        params={"dit": join_bases(trained, bases)},
        opt={"dit": opt},
        ema={"dit": join_bases(ema, bases)},
        metrics=state_lib.add_metrics(state.metrics, scalars),
    )
    return state_lib.next_state(state, updated, finite)


def gradients(
    spec: StepSpec,
    state: state_lib.TrainState,
    frozen: Variables,
    hyperparams: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    index: jax.Array,
) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of the trained leaves and the scalars of one micro-batch, both means.

    Args:
      spec: the flow's static part.
      state: the current state.
      frozen: variables of stem and vit.
      hyperparams: from `hyperparameters`.
      batch: see `train_step`.
      index: int32 [b], positions in the global batch, which determine the random draws.
    """
    key = jax.random.fold_in(state.key, state.step)
    data = flow_data(spec, frozen, batch)
    draws = draw(spec, key, index, batch["label"], data.shape[1:], hyperparams["label_dropout"])
    trained, bases = split_bases(state.params["dit"])

    def objective(leaves: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": fsdp.gather_unstacked(join_bases(leaves, bases))}
        terms = matching.loss(
            lambda x, t: spec.dit.apply(variables, x, t, draws.label),
            matching.make_path(spec.path, spec.radius),
            data,
            draws.noise,
            draws.time,
            radial_weight=hyperparams["radial_weight"],
            jacobi=spec.jacobi or None,
        )
        return terms["rfm"], terms

    grads, terms = jax.grad(objective, has_aux=True)(trained)
    scalars = {"loss": terms["rfm"], "tangential": terms["tangential"], "radial": terms["radial"]}
    return grads, scalars


def flow_data(spec: StepSpec, frozen: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The data x0 of a batch, in the space of the path: float32 [b, n, d]."""
    tokens = tokens_of(spec, frozen, batch)
    return matching.make_path(spec.path, spec.radius).place(tokens)


def tokens_of(spec: StepSpec, frozen: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The latents z of a batch of images or of a cache: float32 [b, n, d]."""
    if "latent" in batch:
        return batch["latent"].astype(jnp.float32)
    if "direction" in batch:
        return latent_record.dequantise(batch["direction"], batch["norm"])
    image = autoencoder.unit_interval(batch["image"])
    return autoencoder.encode(spec.modules, frozen, image).tokens


def draw(
    spec: StepSpec,
    key: jax.Array,
    index: jax.Array,
    labels: jax.Array,
    shape: tuple[int, ...],
    dropout: jax.Array,
) -> Draws:
    """Noise, time and label of each example, from its own key.

    Args:
      spec: the flow's static part.
      key: the step's key.
      index: int32 [b], positions in the global batch.
      labels: int32 [b].
      shape: (n, d).
      dropout: rate at which labels become the null label.
    """

    def keys(constant: int) -> jax.Array:
        return matching.example_keys(jax.random.fold_in(key, constant), index)

    n, d = shape
    noise = matching.make_path(spec.path, spec.radius).prior(keys(state_lib.KEY_FLOW_NOISE), (n, d))
    time = schedule.draw_times(keys(state_lib.KEY_FLOW_TIME), **spec.times._asdict())
    uniforms = jax.vmap(jax.random.uniform)(keys(state_lib.KEY_LABEL_DROP))
    null = spec.dit.num_classes
    return Draws(noise, time, dit.drop_labels(labels, uniforms, dropout, null))  # type: ignore[arg-type]
