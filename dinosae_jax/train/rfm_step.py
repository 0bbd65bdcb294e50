"""One training step of the flow: Riemannian flow matching on the product of spheres.

    image -> frozen encoder -> z -> sphere of radius R -> geodesic to noise -> x_t, velocity
    (x_t, t, label) -> diffusion transformer -> squared error of the tangent part

A batch holds images, or latents that were encoded before (`data.latents`); everything after z is
the same. What is static is a `Stage`, the numbers are arguments, as in `sae_step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from dinosae_jax.flow import matching, schedule
from dinosae_jax.models import autoencoder, ddt, dit, placement
from dinosae_jax.train import accumulate, optim, sharding
from dinosae_jax.train import state as state_lib

Tree = Any
Variables = dict[str, dict[str, Tree]]
MODELS: dict[str, Any] = {"LightningDiT": dit.LightningDiT, "DiTDH": ddt.DiTDH}
LOSSES = ("rfm", "tangential", "radial")
METRICS = ("loss", "tangential", "radial", "grad_norm", "learning_rate")


class Times(NamedTuple):
    """The distribution of training times, arguments of `schedule.draw_times`."""

    distribution: str
    mu: float
    sigma: float
    shift: float
    max_time: float


class Stage(NamedTuple):
    """What is static; hashable, the key of the compiled step.

    Attributes:
      modules: the autoencoder's modules.
      dit: LightningDiT or DiTDH.
      path: a name in `matching.PATHS`.
      radius: of the sphere that the flow runs on.
      times: distribution of the training times.
      jacobi: weighting of the loss, see `matching.loss`; '' for none.
      accumulation: micro-batches per update.
    """

    modules: autoencoder.AutoencoderModules
    dit: Any
    path: str
    radius: float
    times: Times
    jacobi: str
    accumulation: int


class Draws(NamedTuple):
    """The random part of an example: noise x1 [b, n, d], time [b], label after dropout [b]."""

    noise: jax.Array
    time: jax.Array
    label: jax.Array


def build(model: Mapping[str, Any], dtype: Any) -> Any:
    """The diffusion transformer of a config: `model` names the class, the rest its arguments."""
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
    name: Any = arguments.pop("model")
    return MODELS[name](**arguments, dtype=dtype)


def init(network: Any, key: jax.Array) -> dict[str, Tree]:
    """Random variables of a diffusion transformer; call it under `jax.jit`."""
    side, channels = network.input_size, network.in_channels
    latents = jnp.zeros((1, side * side, channels))
    return dict(network.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32)))


def numbers(config: Any) -> dict[str, Any]:
    """The numbers of a stage, an argument of the compiled step.

    Args:
      config: model.dit.class_dropout_prob, flow.radial_weight, optimizer, ema, steps.
    """
    return {
        "label_dropout": jnp.float32(config.model.dit.class_dropout_prob),
        "radial_weight": jnp.float32(config.flow.radial_weight),
        "optimizer": optim.numbers(config.optimizer, config.steps),
        "ema": jnp.float32(config.ema),
    }


def split_bases(params: Tree) -> tuple[Tree, Tree]:
    """Parameters that are trained, and the fixed bases (`dit.FIXED_BASES`), each nested.

    The position table and the Fourier frequencies stay at their values: the references mark them
    as not trainable, and that is the form whose trainable parameters are counted (677,543,296 for
    LightningDiT-XL). RAE's script trains them by accident (reference/generation.md 1.5).
    """
    flat = traverse_util.flatten_dict(params)
    bases = {path: leaf for path, leaf in flat.items() if path[-1] in dit.FIXED_BASES}
    trained = {path: leaf for path, leaf in flat.items() if path not in bases}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(bases)


def join_bases(trained: Tree, bases: Tree) -> Tree:
    """The way back from `split_bases`."""
    flat = {**traverse_util.flatten_dict(trained), **traverse_util.flatten_dict(bases)}
    return traverse_util.unflatten_dict(flat)


def create_state(stage: Stage, variables: Variables, seed: int) -> state_lib.TrainState:
    """The state at step 0.

    Args:
      stage: the stage.
      variables: role 'dit'.
      seed: of the run's key.
    """
    params = {"dit": variables["dit"]["params"]}
    opt = {"dit": optim.init(split_bases(params["dit"])[0])}
    return state_lib.create(params, {"dit": {}}, opt, METRICS, seed, ("dit",))


@functools.lru_cache
def compile_step(stage: Stage, mesh: jax.sharding.Mesh) -> Callable[..., state_lib.TrainState]:
    """Jit of `train_step`; the state is donated and keeps its shardings."""

    def step(
        state: state_lib.TrainState, frozen: Variables, batch: Tree, values: Tree
    ) -> state_lib.TrainState:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            new = train_step(stage, state, frozen, batch, values)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(state, mesh))

    return jax.jit(step, donate_argnums=0)


def train_step(
    stage: Stage,
    state: state_lib.TrainState,
    frozen: Variables,
    batch: Mapping[str, jax.Array],
    values: Mapping[str, Any],
) -> state_lib.TrainState:
    """One update of the diffusion transformer; a step that is not finite changes nothing of it.

    Args:
      stage: static.
      state: current.
      frozen: variables of stem and vit; not read where the batch holds latents.
      batch: 'label' int32 [b], and 'image' uint8 [b, h, w, 3], or 'latent' [b, n, d], or
        'direction' int8 [b, n, d] with 'norm' float16 [b, n].
      values: from `numbers`.

    Returns:
      The next state; `step` and the count of skipped steps advance in any case.
    """
    index = placement.spread(jnp.arange(batch["label"].shape[0]))
    one = functools.partial(gradients, stage, state, frozen, values)
    grads, scalars = accumulate.mean_over_micro_batches(one, (batch, index), stage.accumulation)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(scalars["loss"])

    trained, bases = split_bases(state.params["dit"])
    trained, opt = optim.update(
        grads, state.opt["dit"], trained, state.step, values["optimizer"], norm
    )
    ema, _ = split_bases(state.ema["dit"])
    ema = state_lib.update_ema(ema, trained, values["ema"])
    scalars |= {
        "grad_norm": norm,
        "learning_rate": optim.learning_rate(state.step, values["optimizer"]),
    }
    updated = state.replace(  # type: ignore[attr-defined]
        params={"dit": join_bases(trained, bases)},
        opt={"dit": opt},
        ema={"dit": join_bases(ema, bases)},
        metrics=state_lib.add_metrics(state.metrics, scalars),
    )
    return state_lib.advance(state, updated, finite)


def gradients(
    stage: Stage,
    state: state_lib.TrainState,
    frozen: Variables,
    values: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    index: jax.Array,
) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of the trained leaves and the scalars of one micro-batch, both means.

    Args:
      stage: static.
      state: current.
      frozen: variables of stem and vit.
      values: from `numbers`.
      batch: as of `train_step`.
      index: int32 [b], places in the global batch, which the random draws follow.
    """
    key = jax.random.fold_in(state.key, state.step)
    data = encode(stage, frozen, batch)
    draws = draw(stage, key, index, batch["label"], data.shape[1:], values["label_dropout"])
    trained, bases = split_bases(state.params["dit"])

    def objective(leaves: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": placement.gather_rest(join_bases(leaves, bases))}
        terms = matching.loss(
            lambda x, t: stage.dit.apply(variables, x, t, draws.label),
            matching.make_path(stage.path, stage.radius),
            data,
            draws.noise,
            draws.time,
            radial_weight=values["radial_weight"],
            jacobi=stage.jacobi or None,
        )
        return terms["rfm"], terms

    grads, terms = jax.grad(objective, has_aux=True)(trained)
    scalars = {"loss": terms["rfm"], "tangential": terms["tangential"], "radial": terms["radial"]}
    return grads, scalars


def encode(stage: Stage, frozen: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The data x0 of a batch, in the space of the path: float32 [b, n, d]."""
    tokens = tokens_of(stage, frozen, batch)
    return matching.make_path(stage.path, stage.radius).place(tokens)


def tokens_of(stage: Stage, frozen: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The latents z of a batch of images or of a cache: float32 [b, n, d]."""
    if "latent" in batch:
        return batch["latent"].astype(jnp.float32)
    if "direction" in batch:
        rounded = batch["direction"].astype(jnp.float32)
        length = jnp.maximum(jnp.linalg.norm(rounded, axis=-1), 1.0)
        return rounded * (batch["norm"].astype(jnp.float32) / length)[..., None]
    image = batch["image"].astype(jnp.float32) / 255.0
    return autoencoder.encode(stage.modules, frozen, image).tokens


def draw(
    stage: Stage,
    key: jax.Array,
    index: jax.Array,
    labels: jax.Array,
    shape: tuple[int, ...],
    dropout: jax.Array,
) -> Draws:
    """Noise, time and label of each example, from its own key.

    Args:
      stage: static.
      key: of the step.
      index: int32 [b], places in the global batch.
      labels: int32 [b].
      shape: (n, d).
      dropout: rate at which labels become the null label.
    """

    def keys(constant: int) -> jax.Array:
        return matching.example_keys(jax.random.fold_in(key, constant), index)

    n, d = shape
    noise = matching.make_path(stage.path, stage.radius).prior(
        keys(state_lib.KEY_FLOW_NOISE), (n, d)
    )
    time = schedule.draw_times(keys(state_lib.KEY_FLOW_TIME), **stage.times._asdict())
    uniforms = jax.vmap(jax.random.uniform)(keys(state_lib.KEY_LABEL_DROP))
    null = stage.dit.num_classes
    return Draws(noise, time, dit.drop_labels(labels, uniforms, dropout, null))  # type: ignore[arg-type]


def example_losses(
    stage: Stage,
    variables: Variables,
    batch: Mapping[str, jax.Array],
    index: jax.Array,
    key: jax.Array,
    radial_weight: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each example with its label, on noise and times that `key` fixes.

    Args:
      stage: static.
      variables: roles stem, vit and dit.
      batch: as of `train_step`.
      index: int32 [b], places in the evaluation set.
      key: the same for every evaluation.
      radial_weight: as in training.

    Returns:
      `LOSSES`, each float32 [b].
    """
    path = matching.make_path(stage.path, stage.radius)
    data = encode(stage, variables, batch)
    draws = draw(stage, key, index, batch["label"], data.shape[1:], jnp.float32(0.0))
    moved = path.interpolate(data, draws.noise, draws.time)
    prediction = stage.dit.apply(variables["dit"], moved, draws.time, draws.label)

    def one(x0: jax.Array, x1: jax.Array, t: jax.Array, predicted: jax.Array) -> Any:
        return matching.loss(
            lambda *_: predicted[None],
            path,
            x0[None],
            x1[None],
            t[None],
            radial_weight=radial_weight,  # type: ignore[arg-type]
            jacobi=stage.jacobi or None,
        )

    return jax.vmap(one)(data, draws.noise, draws.time, prediction)
