"""What an ablation of flows adds to one of autoencoders: a common encoder, samples, sweeps.

The arms' losses have different targets and cannot be compared, so that samples of every arm are
measured: Frechet and kernel distance in one feature space, a pretrained one or that of the encoder
that all arms share. Then one trained flow a seed is sampled by every method at several step counts,
and decoded at several radii. Every number is kept in scores.json as soon as it is known.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dinosae_jax import config as config_lib
from dinosae_jax.data import images, png
from dinosae_jax.eval import curves, features, frechet, kernel_distance, pictures
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.inference.batching import map_batches
from dinosae_jax.inference.generator import Generator
from dinosae_jax.jobs import measure
from dinosae_jax.models.autoencoder import ROLES
from dinosae_jax.runtime import console, files, sharding, stopping
from dinosae_jax.train import stages
from dinosae_jax.weights import weight_source

METRICS = ("frechet", "kernel")
AFFINE_SPREAD = 0.5
REFERENCE_SEED = 1_000_003  # other crops than those of any training seed
# Fields whose change leaves scores valid; what the weights give is in the features' hash.
GROWING = ("order", "seeds", "sweep", "compile_cache", "weights")
Score = dict[str, float]


def train_autoencoder(
    config: ml_collections.ConfigDict, folder: pathlib.Path, stop: stopping.StopRequest
) -> str:
    """Trains the autoencoder of all arms, where that is not done yet; returns its workdir.

    A random ViT ends in a LayerNorm whose fresh affine part gives all tokens one norm, so that raw
    and projected latents would be the same. A trained one does not; here the affine part is drawn.
    """
    start, workdir = folder / "random", folder / "autoencoder"
    if not (start / weight_source.EXPORT_FILE).exists():
        source = random_source(config.autoencoder.model.to_dict(), config.autoencoder.seed)
        norm = source.variables["vit"]["params"]["norm"]
        random = np.random.default_rng(config.autoencoder.seed)
        drawn = {
            "scale": np.exp(AFFINE_SPREAD * random.standard_normal(norm["scale"].shape)),
            "bias": AFFINE_SPREAD * random.standard_normal(norm["bias"].shape),
        }
        size = np.sqrt(np.mean(drawn["scale"] ** 2 + drawn["bias"] ** 2))  # tokens of unit variance
        norm |= {name: np.float32(value / size) for name, value in drawn.items()}
        weight_source.export(source, start, ROLES)
    stage = config.autoencoder.copy_and_resolve_references()
    stage.name, stage.init_from = "autoencoder", str(start)
    stages.run_stage(stage, workdir, stop)
    return str(workdir)


def compare(
    config: ml_collections.ConfigDict, folder: pathlib.Path, stop: stopping.StopRequest
) -> str:
    """Measures what is not in scores.json yet, and writes tables and pictures.

    Args:
      config: of `configs/ablation_flow.py`, whose arms are trained.
      folder: of the comparison.
      stop: asked before each score.

    Returns:
      The tables, Markdown.

    Raises:
      ValueError: where the folder holds scores of another comparison.
      stopping.Interrupted: after a signal, with every score saved.
    """
    autoencoder = Autoencoder.load(folder / "autoencoder", "float32", batch_size=config.samples)
    network = measure.feature_network(config.weights, autoencoder.mesh, lambda: autoencoder)
    names = titles(network)
    judge = Judge(config, network)
    measured = Scores(folder / "scores.json", recipe_of(config, network), judge)
    measured.add("real crops", lambda: judge.crops)
    scaled = judge.crops / np.float32(255)
    measured.add("reconstructed crops", lambda: png.as_picture(autoencoder.reconstruct(scaled)))
    for setting in settings(config):
        if stopped := stop.agreed():
            raise stopping.Interrupted(f"{config.name} stopped before {setting.key}", stopped)
        measured.add(setting.key, functools.partial(_draw, config, folder, setting))
    text = "\n".join([*describe(config, network), "", *tables(config, measured.scores, names)])
    if jax.process_index() == 0:
        files.write_text(folder / "tables.md", text + "\n")
        _write_pictures(config, folder, measured.scores, names["frechet"])
    console.report(text)
    return text


class Setting(NamedTuple):
    """What one score is of: a trained arm, and how it is sampled."""

    arm: str
    seed: int
    sampler: str
    steps: int
    radius: float  # that the decoder is given, as a multiple of the measured norm

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
    """Everything that is sampled, each once."""
    sweep, seeds = config.sweep, tuple(config.seeds)
    samplings = itertools.product(sweep.samplers, sweep.steps, seeds)
    found = [arm_setting(config, *each) for each in itertools.product(config.order, seeds)]
    found += [sampler_setting(config, *each) for each in samplings]
    found += [radius_setting(config, *each) for each in itertools.product(sweep.radii, seeds)]
    return list(dict.fromkeys(found))


def titles(network: features.FeatureNetwork) -> dict[str, str]:
    """Metric -> its name in tables and pictures, which says the feature space."""
    names = {metric: network.metrics[metric][0] for metric in METRICS}
    return {**names, "kernel": f"{names['kernel']} x 1000"}


def recipe_of(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork
) -> dict[str, Any]:
    """What all scores of a file have in common: training, features, numbers of images."""
    kept = {name: value for name, value in config.to_dict().items() if name not in GROWING}
    return json.loads(json.dumps({**kept, "features": [network.name, network.sha256]}))


def describe(config: ml_collections.ConfigDict, network: features.FeatureNetwork) -> list[str]:
    """A sentence on the feature space, which stands above the tables."""
    tap = network.metrics["frechet"][1]
    return [
        f"Features: {network.name} ({tap}), {config.samples} samples against {config.reference} "
        f"crops of {config.base.data.source}; {config.base.steps} steps of "
        f"{config.base.batch_size}; mean ± deviation of {len(config.seeds)} seed(s)."
    ]


class Judge:
    """Compares images uint8 [b,h,w,3] with fresh crops of the training images.

    Attributes:
      crops: as many other crops as there are samples, uint8.
    """

    def __init__(self, config: ml_collections.ConfigDict, network: features.FeatureNetwork):
        """Draws the crops and computes the reference's features."""
        self.config, self.network = config, network
        self.tap = network.metrics["frechet"][1]
        self.mesh = sharding.make_mesh()
        source = images.open_images(config.base.data, "train")
        found = images.train_batches(
            source, config.base.data, batch_size=config.samples, seed=REFERENCE_SEED
        )
        self.crops = next(found)["image"]
        count = -(-config.reference // config.samples)
        drawn = np.concatenate([next(found)["image"] for _ in range(count)])
        self.reference = self.embed(drawn[: config.reference])

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Features [b,d]."""
        one = functools.partial(self.network, taps=(self.tap,))
        return map_batches(one, pixels, self.config.samples, self.mesh)[self.tap]

    def __call__(self, pixels: np.ndarray) -> Score:
        """The distances of `METRICS`."""
        found, config = self.embed(pixels), self.config
        kernel, _ = kernel_distance.kernel_distance(
            found,
            self.reference,
            config.kernel_subsets,
            min(config.samples, config.kernel_subset_size),
        )
        distance = frechet.frechet_distance_of_few(found, self.reference)
        return {"frechet": distance, "kernel": 1e3 * kernel}


class Scores:
    """Scores by key, kept in a file with the recipe that they share."""

    def __init__(
        self, path: pathlib.Path, recipe: dict[str, Any], judge: Callable[[np.ndarray], Score]
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
                f"{path} holds scores of another comparison ({'; '.join(lines[:5])}); use another "
                "--workdir or delete that file"
            )
        self.scores = saved["scores"]

    def add(self, key: str, make: Callable[[], np.ndarray]) -> None:
        """Judges what `make` makes, unless that was done before."""
        if key in self.scores:
            return
        self.scores[key] = score = self.judge(make())
        if jax.process_index() == 0:
            files.write_json(self.path, {"recipe": self.recipe, "scores": self.scores})
        console.report(f"{key}: " + "  ".join(f"{name} {score[name]:.4g}" for name in METRICS))


def _draw(config: ml_collections.ConfigDict, folder: pathlib.Path, setting: Setting) -> np.ndarray:
    """Samples of a setting, uint8 [b,h,w,3], balanced over the classes."""
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
def _generator(workdir: pathlib.Path) -> Generator:
    return Generator.load(workdir)


def tables(
    config: ml_collections.ConfigDict, scores: dict[str, Score], names: dict[str, str]
) -> list[str]:
    """The lines of three Markdown tables: arms, samplers by steps, decode radii.

    Args:
      config: of the comparison.
      scores: of all its settings.
      names: of the metrics (`titles`).
    """

    def cell(metric: str, setting: Callable[..., Setting], *given: Any) -> str:
        values = [scores[setting(config, *given, seed).key][metric] for seed in config.seeds]
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        return f"{np.mean(values):.3g}{spread}"

    lines = [f"| arm | {' | '.join(names.values())} |", "|---|---|---|"]
    for arm in config.order:
        lines.append(f"| {arm} | {' | '.join(cell(name, arm_setting, arm) for name in METRICS)} |")
    for name in ("reconstructed crops", "real crops"):
        lines.append(
            f"| {name} | {' | '.join(f'{scores[name][metric]:.3g}' for metric in METRICS)} |"
        )
    steps = tuple(config.sweep.steps)
    counts = " | ".join(f"{count} steps" for count in steps)
    lines += ["", f"| sampler, {names['frechet']} | {counts} |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for sampler in config.sweep.samplers:
        cells = [cell("frechet", sampler_setting, sampler, count) for count in steps]
        lines.append(f"| {sampler} | {' | '.join(cells)} |")
    radii = tuple(config.sweep.radii)
    lines += ["", f"| decode radius | {' | '.join(f'x {factor:g}' for factor in radii)} |"]
    lines.append("|---" * (len(radii) + 1) + "|")
    for metric, title in names.items():
        cells = [cell(metric, radius_setting, factor) for factor in radii]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _write_pictures(
    config: ml_collections.ConfigDict, folder: pathlib.Path, scores: dict[str, Score], title: str
) -> None:
    """ablation_flow.png: the sweeps as curves of the Frechet distance, which is called `title`.

    Below them are samples of each arm by class.
    """
    sweep = config.sweep
    steps, radii = tuple(sweep.steps), tuple(sweep.radii)

    def runs(setting: Callable[[Any, int], Setting], places: tuple[float, ...]) -> list[list]:
        return [
            [scores[setting(place, seed).key]["frechet"] for place in places]
            for seed in config.seeds
        ]

    panels = {
        f"{title} over steps": {
            name: (steps, runs(functools.partial(sampler_setting, config, name), steps))
            for name in sweep.samplers
        },
        f"{title} over decode radius / measured": {
            sweep.arm: (radii, runs(functools.partial(radius_setting, config), radii))
        },
    }
    plot = png.decode_png(curves.sweeps_png(panels))
    drawn = (folder / arm / f"seed{config.seeds[0]}" / "samples.png" for arm in config.order)
    grids = [
        pictures.captioned(png.decode_png(path.read_bytes()), arm)
        for arm, path in zip(config.order, drawn, strict=True)
    ]
    png.write_png(
        folder / "ablation_flow.png", pictures.stack([plot, pictures.side_by_side(grids)], gap=12)
    )
