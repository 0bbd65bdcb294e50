"""One training step of the autoencoder, for every stage.

    image -> encode -> z (+ latent noise) -> features -> last convolution -> reconstruction
    pixel terms (l1, lpips, gan) act on the reconstruction, token terms (cosine, mse) on z

A stage is a set of trainable roles and a set of loss names. What follows from the sets is static.
The hyperparameters (weights, rates, tau) are arguments, so that stages with equal sets share one
compiled step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dinosae_jax.eval import image_quality
from dinosae_jax.losses import adversarial, alignment
from dinosae_jax.losses import reconstruction as reconstruction_losses
from dinosae_jax.models import autoencoder
from dinosae_jax.runtime import fsdp
from dinosae_jax.train import accumulate, discriminator_step, optim
from dinosae_jax.train import state as state_lib

Tree = Any
Variables = dict[str, dict[str, Tree]]
TOKEN_TERMS = {"cosine": alignment.cosine, "mse": alignment.mse}


class StepSpec(NamedTuple):
    """The static part of a stage; hashable, the key of the compiled step.

    Attributes:
      modules: the autoencoder's modules.
      lpips: perceptual distance module, or None where its weight is 0.
      discriminator: its modules, or None where the gan weight is 0.
      trainable: roles that gradients are taken for.
      losses: names of the terms with a weight above 0.
      noisy: whether the decoder sees noisy latents.
      accumulation: micro-batches per update.
      matmul_precision: of products of float32 factors, but for parts that have their own.
    """

    modules: autoencoder.AutoencoderModules
    lpips: Any
    discriminator: discriminator_step.Discriminator | None
    trainable: tuple[str, ...]
    losses: tuple[str, ...]
    noisy: bool
    accumulation: int
    matmul_precision: str = "default"

    @property
    def encodes(self) -> bool:
        """Whether the encoder is inside the differentiated function."""
        return "stem" in self.trainable

    @property
    def aligns(self) -> bool:
        """Whether the teacher runs."""
        return any(name in TOKEN_TERMS for name in self.losses)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The scalars of each step, in the order of metrics.jsonl."""
        adversarial = discriminator_step.METRICS if self.discriminator else ()
        plain = tuple(name for name in self.losses if name != "gan")
        return ("loss", *plain, *adversarial, "psnr", "grad_norm", "learning_rate")


class Gradients(NamedTuple):
    """Means over one micro-batch: gradients by role, scalars, new collections.

    Attributes:
      params: gradients of the trainable roles (the GAN's generator).
      adversarial: the unweighted gradients of the GAN's loss; None where `params` includes them.
      heads: gradients of the discriminator's heads, or None.
      scalars: the step's metrics.
      extra: role -> collections after the step.
    """

    params: dict[str, Tree]
    adversarial: dict[str, Tree] | None
    heads: Tree
    scalars: dict[str, jax.Array]
    extra: dict[str, Tree]


def hyperparameters(config: Any) -> dict[str, Any]:
    """The hyperparameters of a stage, an argument of the compiled step.

    Args:
      config: losses, latent_noise, gan, optimizer, ema, steps.
    """
    noise = config.latent_noise
    plain = {**config.optimizer.to_dict(), "weight_decay": 0.0, "clip_norm": 0.0}
    return {
        "losses": {n: jnp.float32(w) for n, w in config.losses.items() if w > 0},
        "latent_noise": {n: jnp.float32(noise[n]) for n in ("tau", "tau_end", "ramp_steps")},
        "optimizer": optim.hyperparameters(config.optimizer, config.steps),
        "discriminator": optim.hyperparameters(plain, config.steps),
        "gan": {name: jnp.int32(config.gan[name]) for name in ("start", "disc_start")},
        "ema": jnp.float32(config.ema),
    }


def create_state(spec: StepSpec, variables: Variables, seed: int) -> state_lib.TrainState:
    """The state at step 0 of a stage.

    Args:
      spec: the stage's static part.
      variables: role -> {'params': ..., other collections} for the trainable roles at least.
      seed: seed of the run's key.
    """
    trained = spec.trainable + (("disc_heads",) if spec.discriminator else ())
    params = {role: variables[role]["params"] for role in trained}
    extra = {
        role: {name: tree for name, tree in variables[role].items() if name != "params"}
        for role in trained
    }
    opt = {"generator": optim.init({role: params[role] for role in spec.trainable})}
    if spec.discriminator:
        opt["discriminator"] = optim.init(params["disc_heads"])
    return state_lib.create(params, extra, opt, spec.metric_names, seed, spec.trainable)


def train_step(
    spec: StepSpec,
    state: state_lib.TrainState,
    frozen: Variables,
    batch: Mapping[str, jax.Array],
    hyperparams: Mapping[str, Any],
) -> state_lib.TrainState:
    """One update of the trainable roles; a step that is not finite changes none of them.

    Args:
      spec: the stage's static part.
      state: the current state.
      frozen: variables of the roles that are not trained.
      batch: 'image' uint8 [b, h, w, 3].
      hyperparams: from `hyperparameters`.

    Returns:
      The next state; `step` and the count of skipped steps advance in any case.
    """
    images = batch["image"]
    index = fsdp.shard_by_example(jnp.arange(images.shape[0]))
    one = functools.partial(gradients, spec, state, frozen, hyperparams)
    independent = "batch_stats" not in state.extra.get("decoder", {})
    grads = accumulate.mean_over_micro_batches(one, (images, index), spec.accumulation, independent)
    if grads.adversarial is not None:
        grads = add_adversarial(spec, grads, gan_strength(state, hyperparams))
    norm = optax.tree.norm((grads.params, grads.heads))
    finite = jnp.isfinite(jnp.stack([norm, *grads.scalars.values()])).all()

    generator = {role: state.params[role] for role in spec.trainable}
    generator_norm = optax.tree.norm(grads.params)
    generator, generator_opt = optim.update(
        grads.params,
        state.opt["generator"],
        generator,
        state.step,
        hyperparams["optimizer"],
        generator_norm,
    )
    params, opt, extra = generator, {"generator": generator_opt}, grads.extra
    if spec.discriminator:
        on = state.step >= hyperparams["gan"]["disc_start"]
        old = (state.params["disc_heads"], state.opt["discriminator"], state.extra["disc_heads"])
        heads, heads_opt = optim.update(
            grads.heads, old[1], old[0], state.step, hyperparams["discriminator"], norm
        )
        new = (heads, heads_opt, extra["disc_heads"])
        heads, heads_opt, heads_extra = state_lib.select(on, new, old)
        params = {**params, "disc_heads": heads}
        opt = {**opt, "discriminator": heads_opt}
        extra = {**extra, "disc_heads": heads_extra}
    scalars = {
        **grads.scalars,
        "grad_norm": generator_norm,
        "learning_rate": optim.learning_rate(state.step, hyperparams["optimizer"]),
    }
    updated = state.replace(
        params=params,
        extra=extra,
        opt=opt,
        ema=state_lib.update_ema(state.ema, params, hyperparams["ema"]),
        metrics=state_lib.add_metrics(state.metrics, scalars),
    )
    return state_lib.next_state(state, updated, finite)


def gradients(
    spec: StepSpec,
    state: state_lib.TrainState,
    frozen: Variables,
    hyperparams: Mapping[str, Any],
    images: jax.Array,
    index: jax.Array,
) -> Gradients:
    """Forward and backward pass of one micro-batch, in parts that a profile shows by name.

    Args:
      spec: the stage's static part.
      state: the current state.
      frozen: variables of the roles that are not trained.
      hyperparams: from `hyperparameters`.
      images: uint8 [b, h, w, 3].
      index: int32 [b], positions in the global batch, which determine the random draws.
    """
    image = autoencoder.unit_interval(images)
    constant = {**frozen, **merge(fsdp.gather_unstacked(state.params), state.extra)}
    with jax.named_scope("encode"):
        encoded = None if spec.encodes else autoencoder.encode(spec.modules, constant, image)

    def forward(params: dict[str, Tree]) -> tuple[tuple[jax.Array, jax.Array], Tree]:
        variables = {**frozen, **merge(fsdp.gather_unstacked(params), state.extra)}
        code = encoded or autoencoder.encode(spec.modules, variables, image)
        tokens = code.tokens
        if spec.noisy:
            tokens = add_latent_noise(tokens, state, hyperparams["latent_noise"], index)
        features, statistics = autoencoder.decode_features(
            spec.modules, variables, tokens, code.grid, train=True
        )
        reconstruction = autoencoder.decode_head(spec.modules, variables, features)
        return (reconstruction, code.tokens), (features, statistics)

    generator = {role: state.params[role] for role in spec.trainable}
    with jax.named_scope("reconstruct"):
        (reconstruction, tokens), vjp, (features, statistics) = jax.vjp(
            forward, generator, has_aux=True
        )
    weights = hyperparams["losses"]
    with jax.named_scope("pixel_losses"):
        pixels = _weighted(_pixel_terms(spec, frozen, image), weights, reconstruction)
    with jax.named_scope("alignment"):
        aligned = _weighted(_token_terms(spec, constant, image), weights, tokens)
    scalars = {**pixels.terms, **aligned.terms, "loss": pixels.loss + aligned.loss}
    scalars["psnr"] = jnp.mean(image_quality.psnr(jnp.clip(reconstruction, 0.0, 1.0), image))
    extra = dict(state.extra)
    if extra["decoder"]:
        extra["decoder"] = {"batch_stats": statistics}

    heads, gan_params, pixel_cotangent = None, None, pixels.cotangent
    if spec.discriminator:
        with jax.named_scope("gan"):
            noise_free = reconstruction
            if spec.noisy:
                assert encoded  # latent noise is refused in stages that train the stem
                noise_free = autoencoder.decode(
                    spec.modules, constant, encoded.tokens, encoded.grid
                )
            generator_gan, discriminator_gan = _adversarial(
                spec,
                state,
                constant,
                (image, reconstruction, noise_free),
                features,
                pixel_cotangent,
                index,
            )
        scalars |= {**discriminator_gan.scalars, "gan": generator_gan.loss}
        heads, extra["disc_heads"] = (
            discriminator_gan.params,
            {"spectral": discriminator_gan.spectral},
        )
        if spec.accumulation == 1:
            strength = gan_strength(state, hyperparams)
            pixel_cotangent = (
                pixel_cotangent + strength * generator_gan.weight * generator_gan.cotangent
            )
            scalars = _count_adversarial(scalars, strength, generator_gan.weight)
        else:  # the weight is computed from all micro-batches, after the last
            with jax.named_scope("backward_gan"):
                (gan_params,) = vjp((generator_gan.cotangent, jnp.zeros_like(tokens)))
    with jax.named_scope("backward"):
        (params,) = vjp((pixel_cotangent, aligned.cotangent))
    return Gradients(params, gan_params, heads, scalars, extra)


def gan_strength(state: state_lib.TrainState, hyperparams: Mapping[str, Any]) -> jax.Array:
    """The weight of the GAN's loss, 0 before `gan.start`; the adaptive weight multiplies it."""
    return jnp.where(state.step >= hyperparams["gan"]["start"], hyperparams["losses"]["gan"], 0.0)


def add_adversarial(spec: StepSpec, grads: Gradients, strength: jax.Array) -> Gradients:
    """Adds the GAN's gradients of micro-batches, with the adaptive weight of the whole batch.

    The weight compares the norms of the last kernel's gradients, which are in both trees.

    Args:
      spec: the stage's static part.
      grads: means over all micro-batches.
      strength: from `gan_strength`.
    """
    assert grads.adversarial
    kernels = (
        discriminator_step.last_kernel(spec.modules, {"params": tree["decoder"]})
        for tree in (grads.params, grads.adversarial)
    )
    weight = adversarial.adaptive_weight(*(jnp.linalg.norm(kernel.ravel()) for kernel in kernels))
    params = jax.tree.map(lambda a, b: a + strength * weight * b, grads.params, grads.adversarial)
    scalars = _count_adversarial(grads.scalars, strength, weight)
    return grads._replace(params=params, adversarial=None, scalars=scalars)


def _count_adversarial(
    scalars: dict[str, jax.Array], strength: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    loss = scalars["loss"] + strength * weight * scalars["gan"]
    return {**scalars, "gan_weight": weight, "loss": loss}


def _adversarial(
    spec: StepSpec,
    state: state_lib.TrainState,
    variables: Variables,
    images: tuple[jax.Array, jax.Array, jax.Array],
    features: jax.Array,
    pixel_cotangent: jax.Array,
    index: jax.Array,
) -> tuple[discriminator_step.GeneratorGradient, discriminator_step.DiscriminatorGradients]:
    """The generator's adversarial gradient and the discriminator's gradients.

    Args:
      spec: the stage's static part.
      state: its key and step determine the augmentations.
      variables: every role.
      images: originals, reconstructions, and noise-free reconstructions for the discriminator.
      features: input of the decoder's last layer.
      pixel_cotangent: cotangent of the weighted pixel losses.
      index: int32 [b], positions in the global batch.
    """
    assert spec.discriminator
    image, reconstruction, noise_free = images
    key = jax.random.fold_in(state.key, state.step)
    draws = functools.partial(discriminator_step.augment_draws, key, index=index)
    generator_gan = discriminator_step.generator_loss_and_grad(
        spec.discriminator,
        variables,
        discriminator_step.decoder_head_fn(spec.modules, variables),
        discriminator_step.last_kernel(spec.modules, variables["decoder"]),
        features,
        reconstruction,
        pixel_cotangent,
        draws(state_lib.KEY_AUGMENT_GENERATOR),
    )
    discriminator_gan = discriminator_step.discriminator_gradients(
        spec.discriminator,
        variables,
        image,
        noise_free,
        (draws(state_lib.KEY_AUGMENT_REAL), draws(state_lib.KEY_AUGMENT_FAKE)),
    )
    return generator_gan, discriminator_gan


def add_latent_noise(
    tokens: jax.Array,
    state: state_lib.TrainState,
    noise: Mapping[str, jax.Array],
    index: jax.Array,
) -> jax.Array:
    """Adds latent noise: z + sigma * eps with sigma ~ U(0, tau) per image, the paper's eq. 10.

    Args:
      tokens: float32 [b, n, d].
      state: its key and step determine the draw.
      noise: tau, tau_end and ramp_steps; tau moves to tau_end over ramp_steps (arXiv
        2601.22904v2).
      index: int32 [b], positions in the global batch.
    """
    tau = jnp.where(
        noise["ramp_steps"] > 0,
        noise["tau"]
        + (noise["tau_end"] - noise["tau"])
        * jnp.clip(state.step / jnp.maximum(noise["ramp_steps"], 1.0), 0.0, 1.0),
        noise["tau"],
    )
    key = jax.random.fold_in(state.key, state.step)

    def perturb(example: jax.Array, position: jax.Array) -> jax.Array:
        sigma_key, noise_key = (
            jax.random.fold_in(jax.random.fold_in(key, constant), position)
            for constant in (state_lib.KEY_LATENT_SIGMA, state_lib.KEY_LATENT_NOISE)
        )
        sigma = tau * jax.random.uniform(sigma_key)
        return example + sigma * jax.random.normal(noise_key, example.shape)

    return jax.vmap(perturb)(tokens, index)


def merge(params: dict[str, Tree], extra: dict[str, Tree]) -> Variables:
    """Joins parameters and other collections to the variables that modules take, by role."""
    return {role: {"params": tree, **extra.get(role, {})} for role, tree in params.items()}


def _pixel_terms(spec: StepSpec, frozen: Variables, image: jax.Array) -> dict[str, Callable]:
    terms: dict[str, Callable] = {}
    if "l1" in spec.losses:
        terms["l1"] = lambda made: reconstruction_losses.l1(made, image)
    if "lpips" in spec.losses:
        terms["lpips"] = lambda made: jnp.mean(spec.lpips.apply(frozen["lpips"], image, made))
    return terms


def _token_terms(spec: StepSpec, variables: Variables, image: jax.Array) -> dict[str, Callable]:
    """The alignment terms; the teacher runs only where there are any."""
    names = [name for name in spec.losses if name in TOKEN_TERMS]
    if not names:
        return {}
    teacher = autoencoder.encode_teacher(spec.modules, variables, image).tokens
    return {name: functools.partial(TOKEN_TERMS[name], teacher=teacher) for name in names}


class _Weighted(NamedTuple):
    """Weighted sum of terms, the terms without weights, and the sum's gradient."""

    loss: jax.Array
    terms: dict[str, jax.Array]
    cotangent: jax.Array


def _weighted(
    terms: Mapping[str, Callable[[jax.Array], jax.Array]],
    weights: Mapping[str, jax.Array],
    value: jax.Array,
) -> _Weighted:
    """The weighted sum of terms at `value`, and its gradient."""
    if not terms:
        return _Weighted(jnp.float32(0.0), {}, jnp.zeros_like(value))

    def total(at: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        each = {name: term(at) for name, term in terms.items()}
        return sum(weights[name] * term for name, term in each.items()), each  # type: ignore[return-value]

    (loss, each), cotangent = jax.value_and_grad(total, has_aux=True)(value)
    return _Weighted(loss, each, cotangent)
