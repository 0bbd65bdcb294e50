"""Trained flows compared by their samples: settings, features and distances, stored scores."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax.data import images, png
from dinosae_jax.eval import features, frechet, kernel_distance
from dinosae_jax.inference.batching import map_batches
from dinosae_jax.inference.generator import Generator
from dinosae_jax.runtime import console, files, sharding

METRICS = ("frechet", "kernel")


REFERENCE_SEED = 1_000_003  # other crops than those of any training seed


# Fields whose change leaves scores valid; what the weights give is in the features' hash.
GROWING = ("order", "seeds", "sweep", "compile_cache", "weights")


Score = dict[str, float]


class Setting(NamedTuple):
    """What one score measures: a trained arm, and how it is sampled."""

    arm: str
    seed: int
    sampler: str
    steps: int
    radius: float  # the decoder's token norm, as a multiple of the measured norm

    @property
    def key(self) -> str:
        """Its name in scores.json."""
        return f"{self.arm}, seed {self.seed}, {self.sampler} {self.steps}, radius x {self.radius}"


def arm_setting(config: ml_collections.ConfigDict, arm: str, seed: int) -> Setting:
    """An arm by its own sampler."""
    return Setting(arm, seed, config.base.sampling.sampler, config.base.sampling.steps, 1.0)


def sampler_setting(
    config: ml_collections.ConfigDict, sampler: str, steps: int, seed: int
) -> Setting:
    """The swept arm by one sampler."""
    return Setting(config.sweep.arm, seed, sampler, steps, 1.0)


def radius_setting(config: ml_collections.ConfigDict, radius: float, seed: int) -> Setting:
    """The swept arm at one decode radius."""
    own = arm_setting(config, config.sweep.arm, seed)
    return own._replace(steps=config.sweep.radius_steps, radius=float(radius))


def settings(config: ml_collections.ConfigDict) -> list[Setting]:
    """Every setting, each once."""
    sweep, seeds = config.sweep, tuple(config.seeds)
    samplings = itertools.product(sweep.samplers, sweep.steps, seeds)
    listed = [arm_setting(config, *each) for each in itertools.product(config.order, seeds)]
    listed += [sampler_setting(config, *each) for each in samplings]
    listed += [radius_setting(config, *each) for each in itertools.product(sweep.radii, seeds)]
    return list(dict.fromkeys(listed))


def recipe_of(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork
) -> dict[str, Any]:
    """What all scores of a file have in common: training, features, numbers of images."""
    kept = {name: value for name, value in config.to_dict().items() if name not in GROWING}
    return json.loads(json.dumps({**kept, "features": [network.name, network.sha256]}))


class Judge:
    """Compares images uint8 [b, h, w, 3] with fresh crops of the training images.

    Attributes:
      crops: uint8 [samples, h, w, 3], crops that are not in the reference.
    """

    def __init__(self, config: ml_collections.ConfigDict, network: features.FeatureNetwork):
        """Draws the crops and computes the reference's features."""
        self.config, self.network = config, network
        self.tap = network.metrics["frechet"][1]
        self.mesh = sharding.make_mesh()
        source = images.open_images(config.base.data, "train")
        batches = images.train_batches(
            source, config.base.data, batch_size=config.samples, seed=REFERENCE_SEED
        )
        self.crops = next(batches)["image"]
        count = -(-config.reference // config.samples)
        drawn = np.concatenate([next(batches)["image"] for _ in range(count)])
        self.reference = self.embed(drawn[: config.reference])

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Features [b, d]."""
        apply = functools.partial(self.network, taps=(self.tap,))
        return map_batches(apply, pixels, self.config.samples, self.mesh)[self.tap]

    def __call__(self, pixels: np.ndarray) -> Score:
        """The distances of `METRICS`."""
        embedded, config = self.embed(pixels), self.config
        kernel, _ = kernel_distance.kernel_distance(
            embedded,
            self.reference,
            config.kernel_subsets,
            min(config.samples, config.kernel_subset_size),
        )
        distance = frechet.frechet_distance_of_few(embedded, self.reference)
        return {"frechet": distance, "kernel": 1e3 * kernel}


class Scores:
    """Scores by key, kept in a file with the recipe that they share."""

    def __init__(
        self, path: epath.Path, recipe: dict[str, Any], judge: Callable[[np.ndarray], Score]
    ):
        """Reads what the file holds.

        Raises:
          ValueError: where it holds scores of another recipe.
        """
        self.path, self.recipe, self.judge = path, recipe, judge
        self.scores: dict[str, Score] = {}
        if not path.exists():
            return
        saved = json.loads(path.read_text())
        if lines := config_lib.differences(recipe, saved["recipe"]):
            raise ValueError(
                f"scores are kept for one comparison; got {path} of another "
                f"({'; '.join(lines[:5])}); use another --workdir or delete that file"
            )
        self.scores = saved["scores"]

    def add(self, key: str, make: Callable[[], np.ndarray]) -> None:
        """Scores the images that `make` returns, unless the key has a score."""
        if key in self.scores:
            return
        self.scores[key] = score = self.judge(make())
        if jax.process_index() == 0:
            files.write_json(self.path, {"recipe": self.recipe, "scores": self.scores})
        console.report(f"{key}: " + "  ".join(f"{name} {score[name]:.4g}" for name in METRICS))


def draw_samples(
    config: ml_collections.ConfigDict, folder: epath.Path, setting: Setting
) -> np.ndarray:
    """Samples of a setting, uint8 [b, h, w, 3], balanced over the classes."""
    generator = _generator(folder / setting.arm / f"seed{setting.seed}")
    measured = generator.convention.decode_radius
    assert measured is not None
    drawn = generator.sample(
        np.arange(config.samples) % generator.num_classes,
        key=jax.random.PRNGKey(setting.seed),
        sampler=setting.sampler,
        steps=setting.steps,
        decode_radius=None if setting.radius == 1.0 else setting.radius * measured,
        batch_size=config.samples,
    )
    return png.as_picture(drawn)


@functools.lru_cache(maxsize=2)
def _generator(workdir: epath.Path) -> Generator:
    return Generator.load(workdir)
