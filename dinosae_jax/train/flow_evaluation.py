"""What is measured while a flow trains: its losses on held-out images, and KID of a few samples.

KID compares samples with training images in the encoder's own feature space, by the code of the
evaluation job. Noise, labels and images are fixed, so that an interrupted run writes the same
values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from dinosae_jax.data import crops, loading, png
from dinosae_jax.eval import features, image_quality, kernel_distance
from dinosae_jax.flow import matching
from dinosae_jax.inference.generator import Generator
from dinosae_jax.report import pictures
from dinosae_jax.runtime import jit, sharding, stopping
from dinosae_jax.train import flow_step
from dinosae_jax.train import state as state_lib

Tree = Any
LOSSES = ("rfm", "tangential", "radial")
SHOWN_CLASSES, SHOWN_EACH = 10, 4
KID = "eval/kid_encoder"  # in the encoder's features, comparable with itself alone


def held_out_losses(
    config: ml_collections.ConfigDict,
    spec: flow_step.StepSpec,
    frozen: flow_step.Variables,
    source: loading.Source,
    mesh: jax.sharding.Mesh,
    state: state_lib.TrainState,
) -> dict[str, float]:
    """Mean losses of the moving averages over the evaluation images, on fixed noise and times."""
    weight = jnp.float32(config.flow.radial_weight)
    key = jax.random.PRNGKey(config.seed)
    losses = _compiled_losses(spec)
    sums = dict.fromkeys(LOSSES, 0.0)
    count = start = 0
    batches = loading.evaluation_batches(source, config, mesh)
    for batch in stopping.interruptible(batches, f"{config.name}, in its evaluation,"):
        placed = sharding.put_batch(batch, mesh)
        data = {name: placed[name] for name in loading.fields_of(source)}
        each = losses(state.ema, frozen, data, start, key, weight)
        mask = sharding.gather(placed["mask"])
        start += len(mask)
        count += int(mask.sum())
        for name in sums:
            sums[name] += float((sharding.gather(each[name]).astype(np.float64) * mask).sum())
    names = {"loss": "rfm", "tangential": "tangential", "radial": "radial"}
    return {f"eval/{name}": sums[term] / count for name, term in names.items()}


class SampleDistance:
    """KID of `eval.samples` samples against as many training images."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        spec: flow_step.StepSpec,
        frozen: flow_step.Variables,
        source: loading.Source,
        mesh: jax.sharding.Mesh,
    ):
        """Stores the arguments; nothing is computed before the first call.

        Args:
          config: eval, data and seed.
          spec: the flow's static part.
          frozen: roles stem and vit at least, on the devices.
          source: the training images.
          mesh: the devices.
        """
        self.config, self.spec, self.source, self.mesh = config, spec, source, mesh
        self.size = sharding.device_multiple(config.eval.batch_size, mesh)
        self.network = features.encoder(spec.modules, frozen, "", mesh)

    @functools.cached_property
    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Features [n, d] and labels [n] of the first images of training, in whole batches."""
        fields = loading.fields_of(self.source)
        found = loading.training_batches(self.source, self.config, self.mesh, fields, self.size)
        count = -(-self.config.eval.samples // self.size)
        rows, labels = [], []
        for _ in range(count):
            stopping.check(f"{self.config.name}, in its evaluation,")
            batch = sharding.put_batch(next(found), self.mesh)
            rows.append(self._of_training(batch))
            labels.append(sharding.gather(batch["label"]))
        return np.concatenate(rows), np.concatenate(labels)

    def __call__(self, generator: Generator) -> dict[str, float]:
        """The distance of a generator's samples, with the labels of the training images.

        Whole batches are drawn, so that nothing is compiled twice; samples beyond `eval.samples`
        are left out.
        """
        reference, labels = self.reference
        rows = [self._drawn(generator, labels, start) for start in range(0, len(labels), self.size)]
        kept = slice(self.config.eval.samples)
        distance = kernel_distance.squared_mmd(np.concatenate(rows)[kept], reference[kept])
        return {KID: distance}

    def _drawn(
        self, generator: Generator, labels: NDArray[np.int32], start: int
    ) -> NDArray[np.float32]:
        drawn = generator.sample(
            labels[start : start + self.size],
            key=jax.random.PRNGKey(self.config.seed),
            first_index=start,
            batch_size=self.size,
        )
        pixels = np.asarray(image_quality.to_uint8(jnp.asarray(drawn), "round"))
        mine = pixels[sharding.local_rows(self.mesh, self.size)]
        return self._features(sharding.put_batch({"image": mine}, self.mesh)["image"])

    def _of_training(self, batch: Tree) -> NDArray[np.float32]:
        if "image" in batch:
            return self._features(batch["image"])
        return sharding.gather(jnp.mean(flow_step.tokens_of(self.spec, {}, batch), axis=1))

    def _features(self, pixels: jax.Array) -> NDArray[np.float32]:
        tap = features.ENCODER_TAP
        return sharding.gather(self.network(pixels, (tap,))[tap])


@functools.lru_cache
def _compiled_losses(spec: flow_step.StepSpec) -> Callable[..., Tree]:
    @jit.jit_often
    def losses(ema: Tree, frozen: Tree, batch: Tree, start: int, key: Any, weight: Any) -> Tree:
        variables = {**frozen, "dit": {"params": ema["dit"]}}
        index = start + jnp.arange(batch["label"].shape[0])
        return example_losses(spec, variables, batch, index, key, weight)

    return losses


def write_samples(
    generator: Generator,
    seed: int,
    batch_size: int,
    path: epath.Path,
    examples: Callable[[Iterable[int]], dict[int, NDArray[np.uint8]]] | None,
) -> None:
    """Writes a grid of up to `SHOWN_CLASSES` classes with `SHOWN_EACH` samples each.

    Args:
      generator: draws the samples.
      seed: of the noise.
      batch_size: of the sampler.
      path: of the PNG file.
      examples: labels -> a training image [h, w, 3] of each, which goes before its samples; None
        where the flow is trained on latents.
    """
    count = min(generator.num_classes, SHOWN_CLASSES)
    classes = np.linspace(0, generator.num_classes - 1, count).round().astype(np.int32)
    labels = np.repeat(classes, SHOWN_EACH)
    images = generator.sample(labels, key=jax.random.PRNGKey(seed), batch_size=batch_size)
    if jax.process_index() == 0:
        shown = pictures.enlarged(images)
        rows = shown.reshape(count, SHOWN_EACH, *shown.shape[1:])
        names = [generator.label_names[label] for label in classes]
        if examples:
            found, side = examples(classes.tolist()), images.shape[1]
            blank = np.full((side, side, 3), pictures.BACKGROUND, np.uint8)
            crop = [crops.adm_center_crop(found.get(int(label), blank), side) for label in classes]
            rows = np.concatenate([pictures.enlarged(np.stack(crop))[:, None], rows], axis=1)
        png.write_png(path, pictures.class_grid(rows, names))


def example_losses(
    spec: flow_step.StepSpec,
    variables: flow_step.Variables,
    batch: Mapping[str, jax.Array],
    index: jax.Array,
    key: jax.Array,
    radial_weight: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each example with its label, on noise and times determined by `key`.

    Args:
      spec: the flow's static part.
      variables: roles stem, vit and dit.
      batch: see `flow_step.train_step`.
      index: int32 [b], positions in the evaluation set.
      key: the same for every evaluation.
      radial_weight: as in training.

    Returns:
      `LOSSES`, each float32 [b].
    """
    path = matching.make_path(spec.path, spec.radius)
    data = flow_step.flow_data(spec, variables, batch)
    draws = flow_step.draw(spec, key, index, batch["label"], data.shape[1:], jnp.float32(0.0))
    moved = path.interpolate(data, draws.noise, draws.time)
    prediction = spec.dit.apply(variables["dit"], moved, draws.time, draws.label)

    def one(x0: jax.Array, x1: jax.Array, t: jax.Array, predicted: jax.Array) -> Any:
        return matching.loss(
            lambda *_: predicted[None],
            path,
            x0[None],
            x1[None],
            t[None],
            radial_weight=radial_weight,  # type: ignore[arg-type]
            jacobi=spec.jacobi or None,
        )

    return jax.vmap(one)(data, draws.noise, draws.time, prediction)
