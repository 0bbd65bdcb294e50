"""What an ablation of flows adds to one of autoencoders: a common encoder, samples, sweeps.

The arms' losses have different targets and cannot be compared, so that samples of every arm are
measured: Frechet and kernel distance in the feature space of the one autoencoder that all arms
share. Then one trained flow a seed is sampled by every method at several step counts, and decoded
at several radii. Every number is kept in scores.json as soon as it is known.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from dinosae_jax.autoencoder import ROLES, Autoencoder, random_source
from dinosae_jax.data import images
from dinosae_jax.eval import curves, features, frechet, kernel_distance, pictures
from dinosae_jax.generator import Generator
from dinosae_jax.jobs import measure, train, train_flow
from dinosae_jax.train import initialise, logging, sharding, stopping

METRICS = ("frechet", "kernel")
TITLES = {"frechet": "Frechet distance", "kernel": "kernel distance x 1000"}
AFFINE_SPREAD = 0.5
REFERENCE_SEED = 1_000_003  # other crops than those of any training seed
Score = dict[str, float]


def train_autoencoder(
    config: ml_collections.ConfigDict, folder: pathlib.Path, stop: stopping.StopRequest
) -> str:
    """Trains the autoencoder of all arms, where that is not done yet; returns its workdir.

    A random ViT ends in a LayerNorm whose fresh affine part gives all tokens one norm, so that raw
    and projected latents would be the same. A trained one does not; here the affine part is drawn.
    """
    start, workdir = folder / "random", folder / "autoencoder"
    if not (start / initialise.EXPORT_FILE).exists():
        source = random_source(config.autoencoder.model.to_dict(), config.autoencoder.seed)
        norm = source.variables["vit"]["params"]["norm"]
        random = np.random.default_rng(config.autoencoder.seed)
        drawn = {
            "scale": np.exp(AFFINE_SPREAD * random.standard_normal(norm["scale"].shape)),
            "bias": AFFINE_SPREAD * random.standard_normal(norm["bias"].shape),
        }
        size = np.sqrt(np.mean(drawn["scale"] ** 2 + drawn["bias"] ** 2))  # tokens of unit variance
        norm |= {name: np.float32(value / size) for name, value in drawn.items()}
        initialise.export(source, start, ROLES)
    stage = config.autoencoder.copy_and_resolve_references()
    stage.name, stage.init_from = "autoencoder", str(start)
    train.run_stage(stage, workdir, stop)
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
      stopping.Interrupted: after a signal, with every score saved.
    """
    measured = Scores(folder / "scores.json", _judge(config, folder))
    for key, arm, seed, given in settings(config):
        if stopped := stop.agreed():
            raise stopping.Interrupted(f"{config.name} stopped before {key}", stopped)
        measured.add(key, functools.partial(_draw, config, folder, arm, seed, given))
    text = "\n".join(tables(config, measured.scores))
    if jax.process_index() == 0:
        (folder / "tables.md").write_text(text)
        _write_pictures(config, folder, measured.scores)
    logging.report(text)
    return text


def settings(config: ml_collections.ConfigDict) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(key of its score, arm, seed, sampling values) of everything that is sampled."""
    sweep, seeds = config.sweep, tuple(config.seeds)
    for arm, seed in itertools.product(config.order, seeds):
        yield f"arm/{arm}/{seed}", arm, seed, {}
    for sampler, steps, seed in itertools.product(sweep.samplers, sweep.steps, seeds):
        yield f"{sampler}/{steps}/{seed}", sweep.arm, seed, {"sampler": sampler, "steps": steps}
    for factor, seed in itertools.product(sweep.radii, seeds):
        given = {"steps": sweep.radius_steps, "decode_radius": factor}
        yield f"radius/{factor}/{seed}", sweep.arm, seed, given


class Scores:
    """Scores by key, kept in a file."""

    def __init__(self, path: pathlib.Path, judge: Callable[[np.ndarray | str], Score]):
        self.path, self.judge = path, judge
        self.scores: dict[str, Score] = json.loads(path.read_text()) if path.exists() else {}
        for name in ("real crops", "reconstructed crops"):
            self.add(name, functools.partial(str, name))

    def add(self, key: str, make: Callable[[], np.ndarray | str]) -> None:
        """Judges what `make` makes, unless that was done before."""
        if key in self.scores:
            return
        self.scores[key] = score = self.judge(make())
        if jax.process_index() == 0:
            logging.write_json(self.path, self.scores)
        logging.report(f"{key}: " + "  ".join(f"{name} {score[name]:.4g}" for name in METRICS))


def _draw(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    arm: str,
    seed: int,
    given: dict[str, Any],
) -> np.ndarray:
    """Balanced samples uint8 [b,h,w,3] of a trained arm; a decode radius is given as a factor."""
    generator = _generator(folder / arm / f"seed{seed}")
    if "decode_radius" in given:
        measured = generator.convention.decode_radius
        assert measured is not None
        given = {**given, "decode_radius": given["decode_radius"] * measured}
    labels = np.arange(config.samples) % generator.num_classes
    shown = min(generator.num_classes, train_flow.SHOWN_CLASSES) * train_flow.SHOWN_EACH
    key = jax.random.PRNGKey(seed)  # batches of the size that the run compiled for its own samples
    return pictures.as_picture(generator.sample(labels, key=key, batch_size=shown, **given))


@functools.lru_cache(maxsize=2)
def _generator(workdir: pathlib.Path) -> Generator:
    return Generator.load(workdir)


def _judge(
    config: ml_collections.ConfigDict, folder: pathlib.Path
) -> Callable[[np.ndarray | str], Score]:
    """A function that compares images uint8 [b,h,w,3] with fresh crops of the training images.

    'real crops' and 'reconstructed crops' stand for as many other crops, as they are and through
    the autoencoder: what a perfect flow would reach.
    """
    autoencoder = Autoencoder.load(folder / "autoencoder", "float32", batch_size=config.samples)
    network = features.encoder(
        autoencoder.modules,
        autoencoder.variables,
        measure.weights_sha256(autoencoder.variables, ("stem", "vit")),
        autoencoder.mesh,
    )
    recipe = network.recipe(features.ENCODER_TAP, resolution=config.base.data.image_size)
    place = sharding.batch_sharding(autoencoder.mesh)

    def embed(pixels: np.ndarray) -> np.ndarray:
        batch = jax.device_put(pixels, place)
        return sharding.gather(network(batch, (features.ENCODER_TAP,))[features.ENCODER_TAP])

    source = images.open_source(config.base.data, "train")
    crops = images.train_batches(
        source, config.base.data, batch_size=config.samples, seed=REFERENCE_SEED
    )
    real = next(crops)["image"]
    reference = np.concatenate(
        [embed(next(crops)["image"]) for _ in range(-(-config.reference // config.samples))]
    )
    moments = frechet.statistics(reference, recipe)

    def judge(pixels: np.ndarray | str) -> Score:
        if isinstance(pixels, str):
            named = real
            if pixels == "reconstructed crops":
                named = pictures.as_picture(autoencoder.reconstruct(real / np.float32(255)))
            pixels = named
        found = embed(pixels)
        kernel, _ = kernel_distance.kernel_distance(
            found, reference, config.kernel_subsets, min(config.samples, config.kernel_subset_size)
        )
        return {
            "frechet": frechet.frechet_distance(frechet.statistics(found, recipe), moments),
            "kernel": 1e3 * kernel,
        }

    return judge


def tables(config: ml_collections.ConfigDict, scores: dict[str, Score]) -> list[str]:
    """The lines of three Markdown tables: arms, samplers by steps, decode radii."""
    seeds = tuple(config.seeds)

    def cell(prefix: str, metric: str) -> str:
        values = [scores[f"{prefix}/{seed}"][metric] for seed in seeds]
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        return f"{np.mean(values):.3g}{spread}"

    lines = [f"| arm | {' | '.join(TITLES.values())} |", "|---|---|---|"]
    for arm in config.order:
        lines.append(f"| {arm} | {' | '.join(cell(f'arm/{arm}', name) for name in METRICS)} |")
    for name in ("reconstructed crops", "real crops"):
        lines.append(
            f"| {name} | {' | '.join(f'{scores[name][metric]:.3g}' for metric in METRICS)} |"
        )
    steps = tuple(config.sweep.steps)
    lines += ["", f"| sampler | {' | '.join(f'{count} steps' for count in steps)} |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for sampler in config.sweep.samplers:
        cells = [cell(f"{sampler}/{count}", "frechet") for count in steps]
        lines.append(f"| {sampler} | {' | '.join(cells)} |")
    radii = tuple(config.sweep.radii)
    lines += ["", f"| decode radius | {' | '.join(f'x {factor:g}' for factor in radii)} |"]
    lines.append("|---" * (len(radii) + 1) + "|")
    for metric, title in TITLES.items():
        cells = [cell(f"radius/{factor}", metric) for factor in radii]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _write_pictures(
    config: ml_collections.ConfigDict, folder: pathlib.Path, scores: dict[str, Score]
) -> None:
    """ablation_flow.png: the sweeps as curves, and below them samples of each arm by class."""
    seeds, sweep = tuple(config.seeds), config.sweep

    def runs(prefix: str, places: tuple[float, ...]) -> list[list[float]]:
        return [[scores[f"{prefix}/{x}/{seed}"]["frechet"] for x in places] for seed in seeds]

    panels = {
        "Frechet distance over steps": {
            name: (tuple(sweep.steps), runs(name, tuple(sweep.steps))) for name in sweep.samplers
        },
        "Frechet distance over decode radius / measured": {
            sweep.arm: (tuple(sweep.radii), runs("radius", tuple(sweep.radii)))
        },
    }
    plot = pictures.decode_png(curves.sweeps_png(panels))
    drawn = (folder / arm / f"seed{seeds[0]}" / "samples.png" for arm in config.order)
    grids = [
        pictures.captioned(pictures.decode_png(path.read_bytes()), arm)
        for arm, path in zip(config.order, drawn, strict=True)
    ]
    pictures.write_png(
        folder / "ablation_flow.png", pictures.stack([plot, pictures.side_by_side(grids)], gap=12)
    )
