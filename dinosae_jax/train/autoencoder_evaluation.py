"""How well an autoencoder reconstructs held-out images: metrics, images, robustness."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import images, loading, png
from dinosae_jax.eval import image_quality, robustness
from dinosae_jax.flow import matching
from dinosae_jax.inference import encoding
from dinosae_jax.inference.autoencoder import compiled_decode
from dinosae_jax.losses import alignment
from dinosae_jax.models import autoencoder
from dinosae_jax.names import PATCH_SIZE
from dinosae_jax.report import pictures, sphere_picture
from dinosae_jax.runtime import files, jit, sharding, stopping
from dinosae_jax.train import autoencoder_step
from dinosae_jax.train import state as state_lib

SHOWN, COLUMNS = 10, 5  # reconstructions, pairs per row


class Evaluation:
    """Noise-free reconstructions of the evaluation images by the moving averages."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        spec: autoencoder_step.StepSpec,
        frozen: autoencoder_step.Variables,
        source: images.ImageSource,
        mesh: jax.sharding.Mesh,
    ):
        self.config, self.frozen, self.source, self.mesh = config, frozen, source, mesh
        self.modules = spec.modules
        self.reconstruct = _compiled_reconstruct(spec.modules)

    def _variables(self, state: state_lib.TrainState) -> autoencoder_step.Variables:
        """The autoencoder's roles, with one structure in every stage: stages share programs."""
        variables = {**self.frozen, **autoencoder_step.merge(state.ema, state.extra)}
        return {role: variables[role] for role in ("stem", "vit", "decoder")}

    def _run(self, state: state_lib.TrainState, batch: dict[str, np.ndarray]) -> Any:
        """The whole global batch (image, label, mask) and its reconstructions, on every host."""
        placed = sharding.put_batch(batch, self.mesh)
        result = self.reconstruct(self._variables(state), placed["image"])
        return {name: sharding.gather(value) for name, value in {**placed, **result}.items()}

    def _batches(self) -> loading.Batches:
        """The evaluation batches; between two of them a request to stop is looked at."""
        batches = loading.evaluation_batches(self.source, self.config, self.mesh)
        return stopping.interruptible(batches, f"{self.config.name}, in its evaluation,")

    def metrics(self, state: state_lib.TrainState) -> dict[str, float]:
        """Means over the evaluation images, summed in float64 in their order."""
        sums: dict[str, float] = {}
        count = 0.0
        for batch in self._batches():
            result = self._run(state, batch)
            mask = result["mask"]
            count += float(mask.sum())
            for name in filter(result.__contains__, METRICS):
                each = np.asarray(result[name], np.float64)
                sums[name] = sums.get(name, 0.0) + float((each * mask).sum())
        return {f"eval/{name}": value / count for name, value in sums.items()}

    def write_pictures(self, state: state_lib.TrainState, workdir: epath.Path) -> None:
        """Writes reconstructions.png (one image per class, up to ten) and baselines.json."""
        originals, reconstructions, labels = [], [], []
        baselines: dict[str, list[np.ndarray]] = {"block_means": [], "mean_colour": []}
        for batch in self._batches():
            result = self._run(state, batch)
            keep = result["mask"]
            image = autoencoder.unit_interval(result["image"][keep])
            originals.append(image)
            reconstructions.append(result["reconstruction"][keep])
            labels.append(result["label"][keep])
            for name, decibels in baselines.items():
                plain = getattr(image_quality, name)(jnp.asarray(image))
                decibels.append(np.asarray(image_quality.psnr(plain, jnp.asarray(image))))
        if jax.process_index() != 0:
            return
        first = np.unique(np.concatenate(labels), return_index=True)[1][:SHOWN]
        above, below = (
            pictures.enlarged(np.concatenate(x)[first]) for x in (originals, reconstructions)
        )
        sheet = pictures.pairs(above, below, COLUMNS)
        png.write_png(workdir / "reconstructions.png", sheet)
        files.write_json(
            workdir / "baselines.json",
            {f"{n}_psnr": float(np.mean(np.concatenate(v))) for n, v in baselines.items()},
        )

    def write_robustness(self, state: state_lib.TrainState, workdir: epath.Path) -> None:
        """Writes robustness.json, measured on the first evaluation batch."""
        batch = next(loading.evaluation_batches(self.source, self.config, self.mesh))
        placed = sharding.put_batch({name: batch[name] for name in ("image", "mask")}, self.mesh)
        keep = sharding.gather(placed["mask"])
        turned = _compiled_turned(self.modules)

        def measure(degrees: float) -> np.ndarray:
            each = turned(self._variables(state), placed["image"], jnp.float32(degrees))
            return sharding.gather(each)[keep]

        rows = robustness.curve(measure)
        if jax.process_index() == 0:
            files.write_json(workdir / "robustness.json", rows)

    def write_sphere(self, state: state_lib.TrainState, workdir: epath.Path) -> None:
        """Writes sphere.png of the first evaluation image and the first image of another class."""
        batch = next(loading.evaluation_batches(self.source, self.config, self.mesh))
        placed = sharding.put_batch({n: batch[n] for n in ("image", "label", "mask")}, self.mesh)
        variables = self._variables(state)
        encode = encoding.compiled_encode(self.modules)
        tokens = sharding.gather(encode(variables, placed["image"]))
        labels, keep = sharding.gather(placed["label"]), sharding.gather(placed["mask"])
        others = np.flatnonzero(keep & (labels != labels[0]))
        other = others[0] if len(others) else np.flatnonzero(keep)[-1]
        side = self.config.data.image_size // PATCH_SIZE
        decode = functools.partial(compiled_decode(self.modules, (side, side)), variables)
        sheet = sphere_picture.draw(
            lambda z: sharding.gather(decode(np.asarray(z))),
            jnp.asarray(tokens[0]),
            jnp.asarray(tokens[other]),
            jax.random.PRNGKey(0),
        )
        if jax.process_index() == 0:
            png.write_png(workdir / "sphere.png", sheet)


@functools.lru_cache
def _compiled_turned(modules: autoencoder.AutoencoderModules) -> Callable[..., jax.Array]:
    @jit.jit_often
    def turned(
        variables: autoencoder_step.Variables, batch: jax.Array, degrees: jax.Array
    ) -> jax.Array:
        image = autoencoder.unit_interval(batch)
        code = autoencoder.encode(modules, variables, image)
        keys = matching.example_keys(jax.random.PRNGKey(0), jnp.arange(len(image)))
        decode = functools.partial(autoencoder.decode, modules, variables, grid=code.grid)
        return robustness.turned_psnr(decode, keys, code.tokens, image, degrees)

    return turned


@functools.lru_cache
def _compiled_reconstruct(modules: autoencoder.AutoencoderModules) -> Callable[..., Any]:
    @jit.jit_often
    def compiled(variables: autoencoder_step.Variables, batch: jax.Array) -> Any:
        return reconstruct(modules, variables, autoencoder.unit_interval(batch))

    return compiled


METRICS = ("psnr", "l1", "cosine_similarity")  # of `reconstruct`


def reconstruct(
    modules: autoencoder.AutoencoderModules, variables: autoencoder_step.Variables, image: jax.Array
) -> dict[str, jax.Array]:
    """Noise-free reconstruction and its metrics, for evaluation.

    Args:
      modules: the autoencoder's modules, static.
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
    reconstruction = jnp.clip(autoencoder.decode_head(modules, variables, features), 0.0, 1.0)
    result = {
        "reconstruction": reconstruction,
        "psnr": image_quality.psnr(reconstruction, image),
        "l1": jnp.mean(jnp.abs(reconstruction - image), axis=(1, 2, 3)),
    }
    if autoencoder.has_teacher(variables):
        teacher = autoencoder.encode_teacher(modules, variables, image)
        cosines = alignment.cosine_similarity(code.tokens, teacher.tokens)
        result["cosine_similarity"] = jnp.mean(cosines, axis=-1)
    return result
