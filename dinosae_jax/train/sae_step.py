"""One training step of the autoencoder, for every stage.

    image -> encode -> z (+ latent noise) -> features -> last convolution -> reconstruction
    pixel terms (l1, lpips, gan) pull on the reconstruction, token terms (cosine, mse) on z

A stage is a set of trainable roles and a set of loss names (design: stages are data). Everything
that follows from the sets is static; the numbers (weights, rates, tau) are arguments, so that
stages that differ only in numbers share one compiled step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dinosae_jax.eval import image_quality
from dinosae_jax.losses import adversarial, alignment, reconstruction
from dinosae_jax.models import autoencoder, placement
from dinosae_jax.train import accumulate, gan, optim, sharding
from dinosae_jax.train import state as state_lib

Tree = Any
Variables = dict[str, dict[str, Tree]]
TOKEN_TERMS = {"cosine": alignment.cosine, "mse": alignment.mse}
FIGURES = ("psnr", "l1", "cosine_similarity")  # of `reconstruct`


class Stage(NamedTuple):
    """What is static in a stage; hashable, the key of the compiled step.

    Attributes:
      modules: the autoencoder's modules.
      lpips: perceptual distance module, or None where its weight is 0.
      critics: the discriminator's modules, or None where the gan weight is 0.
      trainable: roles that gradients are taken for.
      losses: names of the terms with a weight above 0.
      noisy: whether the decoder sees noisy latents.
      accumulation: micro-batches per update.
    """

    modules: autoencoder.AutoencoderModules
    lpips: Any
    critics: gan.Critics | None
    trainable: tuple[str, ...]
    losses: tuple[str, ...]
    noisy: bool
    accumulation: int

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
        adversarial = gan.METRICS if self.critics else ()
        plain = tuple(name for name in self.losses if name != "gan")
        return ("loss", *plain, *adversarial, "psnr", "grad_norm", "learning_rate")


class Gradients(NamedTuple):
    """Means over one micro-batch: gradients by role, scalars, new collections.

    Attributes:
      params: of the generator's roles.
      adversarial: the GAN's part of them, unweighted and not in `params`; None where it is.
      heads: the discriminator's gradients, or None.
      scalars: metrics.
      extra: role -> collections after the step.
    """

    params: dict[str, Tree]
    adversarial: dict[str, Tree] | None
    heads: Tree
    scalars: dict[str, jax.Array]
    extra: dict[str, Tree]


def numbers(config: Any) -> dict[str, Any]:
    """The numbers of a stage, an argument of the compiled step.

    Args:
      config: losses, latent_noise, optimizer, ema, steps.
    """
    noise = config.latent_noise
    plain = {**config.optimizer.to_dict(), "weight_decay": 0.0, "clip_norm": 0.0}
    return {
        "losses": {n: jnp.float32(w) for n, w in config.losses.items() if w > 0},
        "latent_noise": {n: jnp.float32(noise[n]) for n in ("tau", "tau_end", "ramp_steps")},
        "optimizer": optim.numbers(config.optimizer, config.steps),
        "discriminator": optim.numbers(plain, config.steps),
        "gan": {name: jnp.int32(config.gan[name]) for name in ("start", "disc_start")},
        "ema": jnp.float32(config.ema),
    }


def create_state(stage: Stage, variables: Variables, seed: int) -> state_lib.TrainState:
    """The state at step 0 of a stage.

    Args:
      stage: the stage.
      variables: role -> {'params': ..., other collections} for the trainable roles at least.
      seed: of the run's key.
    """
    trained = stage.trainable + (("disc_heads",) if stage.critics else ())
    params = {role: variables[role]["params"] for role in trained}
    extra = {
        role: {name: tree for name, tree in variables[role].items() if name != "params"}
        for role in trained
    }
    opt = {"generator": optim.init({role: params[role] for role in stage.trainable})}
    if stage.critics:
        opt["discriminator"] = optim.init(params["disc_heads"])
    return state_lib.create(params, extra, opt, stage.metric_names, seed, stage.trainable)


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
    """One update of the trainable roles; a step that is not finite changes none of them.

    Args:
      stage: static.
      state: current.
      frozen: variables of the roles that are not trained.
      batch: 'image' uint8 [b, h, w, 3].
      values: from `numbers`.

    Returns:
      The next state; `step` and the count of skipped steps advance in any case.
    """
    images = batch["image"]
    index = placement.spread(jnp.arange(images.shape[0]))
    one = functools.partial(gradients, stage, state, frozen, values)
    grads = accumulate.mean_over_micro_batches(one, (images, index), stage.accumulation)
    if grads.adversarial is not None:
        grads = add_adversarial(stage, grads, gan_strength(state, values))
    norm = optax.tree.norm((grads.params, grads.heads))
    finite = jnp.isfinite(jnp.stack([norm, *grads.scalars.values()])).all()

    generator = {role: state.params[role] for role in stage.trainable}
    generator_norm = optax.tree.norm(grads.params)
    generator, generator_opt = optim.update(
        grads.params,
        state.opt["generator"],
        generator,
        state.step,
        values["optimizer"],
        generator_norm,
    )
    params, opt, extra = generator, {"generator": generator_opt}, grads.extra
    if stage.critics:
        on = state.step >= values["gan"]["disc_start"]
        old = (state.params["disc_heads"], state.opt["discriminator"], state.extra["disc_heads"])
        heads, heads_opt = optim.update(
            grads.heads, old[1], old[0], state.step, values["discriminator"], norm
        )
        new = (heads, heads_opt, extra["disc_heads"])
        heads, heads_opt, heads_extra = state_lib.select(on, new, old)
        params = {**params, "disc_heads": heads}
        opt = {**opt, "discriminator": heads_opt}
        extra = {**extra, "disc_heads": heads_extra}
    scalars = {
        **grads.scalars,
        "grad_norm": generator_norm,
        "learning_rate": optim.learning_rate(state.step, values["optimizer"]),
    }
    updated = state.replace(
        params=params,
        extra=extra,
        opt=opt,
        ema=state_lib.update_ema(state.ema, params, values["ema"]),
        metrics=state_lib.add_metrics(state.metrics, scalars),
    )
    return state_lib.advance(state, updated, finite)


def gradients(
    stage: Stage,
    state: state_lib.TrainState,
    frozen: Variables,
    values: Mapping[str, Any],
    images: jax.Array,
    index: jax.Array,
) -> Gradients:
    """Forward and backward of one micro-batch.

    Args:
      stage: static.
      state: current.
      frozen: variables of the roles that are not trained.
      values: from `numbers`.
      images: uint8 [b, h, w, 3].
      index: int32 [b], places in the global batch, which the random draws follow.
    """
    image = images.astype(jnp.float32) / 255.0
    fixed = {**frozen, **merge(placement.gather_rest(state.params), state.extra)}
    encoded = None if stage.encodes else autoencoder.encode(stage.modules, fixed, image)

    def forward(params: dict[str, Tree]) -> tuple[tuple[jax.Array, jax.Array], Tree]:
        variables = {**frozen, **merge(placement.gather_rest(params), state.extra)}
        code = encoded or autoencoder.encode(stage.modules, variables, image)
        tokens = code.tokens
        if stage.noisy:
            tokens = add_latent_noise(tokens, state, values["latent_noise"], index)
        features, statistics = autoencoder.decode_features(
            stage.modules, variables, tokens, code.grid, train=True
        )
        picture = autoencoder.decode_head(stage.modules, variables, features)
        return (picture, code.tokens), (features, statistics)

    generator = {role: state.params[role] for role in stage.trainable}
    (picture, tokens), pull_back, (features, statistics) = jax.vjp(forward, generator, has_aux=True)
    weights = values["losses"]
    pixel_terms = _pixel_terms(stage, frozen, image)
    pixel_loss, scalars, pixel_pull = _weighted(pixel_terms, weights, picture)
    token_terms: dict[str, Callable[..., jax.Array]] = {}
    aligned = [name for name in stage.losses if name in TOKEN_TERMS]
    if aligned:
        teacher = autoencoder.teach(stage.modules, fixed, image).tokens
        token_terms = {n: functools.partial(TOKEN_TERMS[n], teacher=teacher) for n in aligned}
    token_loss, token_scalars, token_pull = _weighted(token_terms, weights, tokens)
    scalars = {**scalars, **token_scalars, "loss": pixel_loss + token_loss}
    scalars["psnr"] = jnp.mean(image_quality.psnr(jnp.clip(picture, 0.0, 1.0), image))
    extra = dict(state.extra)
    if extra["decoder"]:
        extra["decoder"] = {"batch_stats": statistics}

    heads, apart = None, None
    if stage.critics:
        clean = picture
        if stage.noisy:
            assert encoded  # latent noise is refused in stages that train the stem
            clean = autoencoder.decode(stage.modules, fixed, encoded.tokens, encoded.grid)
        pulled, found = _adversarial(
            stage, state, fixed, image, picture, clean, features, pixel_pull, index
        )
        scalars |= {**found.scalars, "gan": pulled.loss}
        heads, extra["disc_heads"] = found.params, {"spectral": found.spectral}
        if stage.accumulation == 1:
            strength = gan_strength(state, values)
            pixel_pull = pixel_pull + strength * pulled.weight * pulled.cotangent
            scalars = _count_adversarial(scalars, strength, pulled.weight)
        else:  # the weight is that of all micro-batches, known after the last of them
            (apart,) = pull_back((pulled.cotangent, jnp.zeros_like(tokens)))
    (params,) = pull_back((pixel_pull, token_pull))
    return Gradients(params, apart, heads, scalars, extra)


def gan_strength(state: state_lib.TrainState, values: Mapping[str, Any]) -> jax.Array:
    """The weight of the GAN's loss, 0 before `gan.start`; the adaptive weight multiplies it."""
    return jnp.where(state.step >= values["gan"]["start"], values["losses"]["gan"], 0.0)


def add_adversarial(stage: Stage, grads: Gradients, strength: jax.Array) -> Gradients:
    """Joins what micro-batches keep apart, so that their weight is the whole batch's.

    The gradients of the last kernel, whose norms the weight compares, are a part of both trees.

    Args:
      stage: static.
      grads: means over all micro-batches.
      strength: from `gan_strength`.
    """
    assert grads.adversarial
    kernels = (
        gan.last_kernel(stage.modules, {"params": tree["decoder"]})
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
    stage: Stage,
    state: state_lib.TrainState,
    variables: Variables,
    image: jax.Array,
    picture: jax.Array,
    clean: jax.Array,
    features: jax.Array,
    pixel_pull: jax.Array,
    index: jax.Array,
) -> tuple[gan.GeneratorPull, gan.DiscriminatorGradients]:
    """The generator's pull on `picture` and the discriminator's gradients on `clean`."""
    assert stage.critics
    key = jax.random.fold_in(state.key, state.step)
    draws = functools.partial(gan.uniforms_of, key, index=index)
    pulled = gan.pull_generator(
        stage.critics,
        variables,
        gan.head_of(stage.modules, variables),
        gan.last_kernel(stage.modules, variables["decoder"]),
        features,
        picture,
        pixel_pull,
        draws(state_lib.KEY_AUGMENT_GENERATOR),
    )
    found = gan.discriminator_gradients(
        stage.critics,
        variables,
        image,
        clean,
        (draws(state_lib.KEY_AUGMENT_REAL), draws(state_lib.KEY_AUGMENT_FAKE)),
    )
    return pulled, found


def add_latent_noise(
    tokens: jax.Array,
    state: state_lib.TrainState,
    noise: Mapping[str, jax.Array],
    index: jax.Array,
) -> jax.Array:
    """Z + sigma * eps with sigma ~ U(0, tau) per image: the paper's eq. 10.

    Args:
      tokens: float32 [b, n, d].
      state: its key and step determine the draw.
      noise: tau, tau_end and ramp_steps; tau moves to tau_end over ramp_steps (second version).
      index: int32 [b], places in the global batch.
    """
    tau = jnp.where(
        noise["ramp_steps"] > 0,
        noise["tau"]
        + (noise["tau_end"] - noise["tau"])
        * jnp.clip(state.step / jnp.maximum(noise["ramp_steps"], 1.0), 0.0, 1.0),
        noise["tau"],
    )
    key = jax.random.fold_in(state.key, state.step)

    def one(example: jax.Array, place: jax.Array) -> jax.Array:
        sigma_key, noise_key = (
            jax.random.fold_in(jax.random.fold_in(key, constant), place)
            for constant in (state_lib.KEY_LATENT_SIGMA, state_lib.KEY_LATENT_NOISE)
        )
        sigma = tau * jax.random.uniform(sigma_key)
        return example + sigma * jax.random.normal(noise_key, example.shape)

    return jax.vmap(one)(tokens, index)


def reconstruct(
    modules: autoencoder.AutoencoderModules, variables: Variables, image: jax.Array
) -> dict[str, jax.Array]:
    """Noise-free reconstruction and its figures, for evaluation.

    Args:
      modules: static.
      variables: every role.
      image: float32 [b, h, w, 3] in [0, 1].

    Returns:
      'reconstruction' [b, h, w, 3] clipped to [0, 1]; 'psnr' (dB), 'l1' and, where the weights hold
      the teacher, 'cosine_similarity' to it (mean over tokens), each [b].
    """
    code = autoencoder.encode(modules, variables, image)
    features, _ = autoencoder.decode_features(
        modules, variables, code.tokens, code.grid, train=False
    )
    picture = jnp.clip(autoencoder.decode_head(modules, variables, features), 0.0, 1.0)
    found = {
        "reconstruction": picture,
        "psnr": image_quality.psnr(picture, image),
        "l1": jnp.mean(jnp.abs(picture - image), axis=(1, 2, 3)),
    }
    if has_teacher(variables):
        teacher = autoencoder.teach(modules, variables, image)
        cosines = alignment.cosine_similarity(code.tokens, teacher.tokens)
        found["cosine_similarity"] = jnp.mean(cosines, axis=-1)
    return found


def has_teacher(variables: Variables) -> bool:
    """Whether the ViT has DINOv3's own patch convolution, which official DINO-SAE files lack."""
    return "patch_embed" in variables["vit"]["params"]


def merge(params: dict[str, Tree], extra: dict[str, Tree]) -> Variables:
    """Parameters and their other collections as the variables that modules take, by role."""
    return {role: {"params": tree, **extra.get(role, {})} for role, tree in params.items()}


def _pixel_terms(stage: Stage, frozen: Variables, image: jax.Array) -> dict[str, Callable]:
    terms: dict[str, Callable] = {}
    if "l1" in stage.losses:
        terms["l1"] = lambda picture: reconstruction.l1(picture, image)
    if "lpips" in stage.losses:
        terms["lpips"] = lambda picture: jnp.mean(
            stage.lpips.apply(frozen["lpips"], image, picture)
        )
    return terms


def _weighted(
    terms: Mapping[str, Callable[[jax.Array], jax.Array]],
    weights: Mapping[str, jax.Array],
    value: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """(weighted sum, each term unweighted, gradient of the sum with respect to `value`)."""
    if not terms:
        return jnp.float32(0.0), {}, jnp.zeros_like(value)

    def total(at: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        each = {name: term(at) for name, term in terms.items()}
        return sum(weights[name] * term for name, term in each.items()), each  # type: ignore[return-value]

    (loss, each), pull = jax.value_and_grad(total, has_aux=True)(value)
    return loss, each, pull
