"""What is measured while a flow trains: its losses on held-out images, and KID of a few samples.

KID compares samples with training images in the encoder's own feature space, by the code of the
evaluation job. Noise, labels and images are fixed, so a run that was interrupted writes the same
numbers as one that was not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from numpy.typing import NDArray

from dinosae_jax.data import loading
from dinosae_jax.eval import features, image_quality, kernel_distance
from dinosae_jax.inference.generator import Generator
from dinosae_jax.runtime import sharding
from dinosae_jax.train import rfm_step
from dinosae_jax.train import state as state_lib

Tree = Any
KID = "eval/kid_encoder"  # in the encoder's features, comparable with itself alone


def held_out_losses(
    config: ml_collections.ConfigDict,
    stage: rfm_step.Stage,
    frozen: rfm_step.Variables,
    source: loading.Source,
    mesh: jax.sharding.Mesh,
    state: state_lib.TrainState,
) -> dict[str, float]:
    """Mean losses of the moving averages over the evaluation images, on fixed noise and times."""
    weight = jnp.float32(config.flow.radial_weight)
    key = jax.random.PRNGKey(config.seed)
    losses = _compiled_losses(stage)
    sums = dict.fromkeys(rfm_step.LOSSES, 0.0)
    count = start = 0
    for batch in loading.evaluation_batches(source, config, mesh):
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
        stage: rfm_step.Stage,
        frozen: rfm_step.Variables,
        source: loading.Source,
        mesh: jax.sharding.Mesh,
    ):
        """Nothing is computed before the first call.

        Args:
          config: eval, data and seed.
          stage: of the flow.
          frozen: roles stem and vit at least, on the devices.
          source: of the training images.
          mesh: the devices.
        """
        self.config, self.stage, self.source, self.mesh = config, stage, source, mesh
        self.size = sharding.device_multiple(config.eval.batch_size, mesh)
        self.network = features.encoder(stage.modules, frozen, "", mesh)

    @functools.cached_property
    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Features [n,d] and labels [n] of the first images of training, in whole batches."""
        fields = loading.fields_of(self.source)
        found = loading.training_batches(self.source, self.config, self.mesh, fields, self.size)
        count = -(-self.config.eval.samples // self.size)
        placed = [sharding.put_batch(next(found), self.mesh) for _ in range(count)]
        rows = [self._of_training(batch) for batch in placed]
        labels = [sharding.gather(batch["label"]) for batch in placed]
        return np.concatenate(rows), np.concatenate(labels)

    def __call__(self, generator: Generator) -> dict[str, float]:
        """The distance of a generator's samples, which get the labels of the training images.

        Whole batches are drawn, so that nothing is compiled twice; what is beyond `eval.samples`
        is left out.
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
        return sharding.gather(jnp.mean(rfm_step.tokens_of(self.stage, {}, batch), axis=1))

    def _features(self, pixels: jax.Array) -> NDArray[np.float32]:
        tap = features.ENCODER_TAP
        return sharding.gather(self.network(pixels, (tap,))[tap])


@functools.lru_cache
def _compiled_losses(stage: rfm_step.Stage) -> Callable[..., Tree]:
    @jax.jit
    def losses(ema: Tree, frozen: Tree, batch: Tree, start: int, key: Any, weight: Any) -> Tree:
        variables = {**frozen, "dit": {"params": ema["dit"]}}
        index = start + jnp.arange(batch["label"].shape[0])
        return rfm_step.example_losses(stage, variables, batch, index, key, weight)

    return losses
