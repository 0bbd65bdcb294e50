"""Trained flows compared by their samples: which settings are drawn, and how."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import png
from dinosae_jax.eval.protocols import scores
from dinosae_jax.eval.protocols.photographs import Photographs
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.inference.generator import Generator


class Setting(NamedTuple):
    """What one score measures: a trained arm, and how it is sampled and decoded."""

    arm: str
    seed: int
    sampler: str
    steps: int
    guidance: float = 1.0
    step: int = 0  # of training; 0 is the last
    radius: float = 1.0  # the decoder's token norm, as a multiple of the measured norm
    decoder: str = ""  # an autoencoder whose decoder takes the place of the flow's own

    @property
    def key(self) -> str:
        """Its name in scores.json; what is as usual is left out."""
        parts = [f"{scores.key_of(self.arm, self.seed)}, {self.sampler} {self.steps}"]
        parts += [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        parts += [f"step {self.step}"] if self.step else []
        parts += [f"radius x {self.radius:g}"] if self.radius != 1 else []
        parts += [f"decoder {self.decoder}"] if self.decoder else []
        return ", ".join(parts)


def arm_setting(
    config: ml_collections.ConfigDict, arm: str, seed: int, guidance: float = 1.0, step: int = 0
) -> Setting:
    """An arm by the base config's own sampler."""
    sampling = config.base.sampling
    return Setting(arm, seed, sampling.sampler, sampling.steps, guidance, step)


def sampler_setting(config: ml_collections.ConfigDict, sampler: str, steps: int) -> Setting:
    """The swept arm by one sampler."""
    return Setting(config.sweep.arm, config.seeds[0], sampler, steps)


def radius_setting(config: ml_collections.ConfigDict, radius: float) -> Setting:
    """The swept arm at one decode radius."""
    return _swept(config)._replace(radius=float(radius))


def decoder_setting(config: ml_collections.ConfigDict, decoder: str) -> Setting:
    """The swept arm by another autoencoder's decoder; '' is its own."""
    return _swept(config)._replace(decoder=decoder)


def _swept(config: ml_collections.ConfigDict) -> Setting:
    return arm_setting(config, config.sweep.arm, config.seeds[0])


def settings(config: ml_collections.ConfigDict) -> list[Setting]:
    """Every setting, each once.

    All arms with all seeds, guided and not, and unguided at earlier steps; the arms that are
    trained once and the sweeps with the first seed.
    """
    sweep, seeds = config.sweep, tuple(config.seeds)
    each_arm = tuple(itertools.product(config.order, seeds))
    of_arms = functools.partial(arm_setting, config)
    listed = [of_arms(*one, scale) for scale in config.guidances for one in each_arm]
    steps = steps_of_training(config).values()
    listed += [of_arms(*one, 1.0, step) for step in steps for one in each_arm]
    listed += [of_arms(arm, seeds[0]) for arm in config.once]
    listed += [sampler_setting(config, *x) for x in itertools.product(sweep.samplers, sweep.steps)]
    listed += [radius_setting(config, radius) for radius in sweep.radii]
    listed += [decoder_setting(config, sweep.decoder)] if sweep.decoder else []
    return list(dict.fromkeys(listed))


def steps_of_training(config: ml_collections.ConfigDict) -> dict[int, int]:
    """Step whose checkpoint is kept -> the `step` of its setting; the last one's is 0."""
    last, every = config.base.steps, config.base.checkpoint.milestones
    earlier = range(every, last, every) if every else ()
    return {step: step for step in earlier} | {last: 0}


def measure(
    config: ml_collections.ConfigDict,
    folder: epath.Path,
    photographs: Photographs,
    setting: Setting,
) -> scores.Score:
    """Draws samples of a setting, balanced over the classes, and compares them with photographs."""
    workdir = scores.workdir_of(folder, setting.arm, setting.seed)
    generator = _generator(workdir / "checkpoints" / str(setting.step) if setting.step else workdir)
    radius = generator.convention.decode_radius
    assert radius is not None
    labels = np.arange(config.samples) % generator.num_classes
    if setting.decoder:
        generator = copy.copy(generator)
        other = Autoencoder.load(setting.decoder, mesh=generator.mesh)
        generator.variables = {**generator.variables, "decoder": other.variables["decoder"]}
    drawn = generator.sample(
        labels,
        key=jax.random.PRNGKey(setting.seed),
        sampler=setting.sampler,
        steps=setting.steps,
        guidance=setting.guidance,
        decode_radius=None if setting.radius == 1.0 else setting.radius * radius,
        batch_size=config.batch_size,
    )
    return photographs.measure(photographs.embed(png.as_picture(drawn)), labels)


@functools.lru_cache(maxsize=2)
def _generator(workdir: epath.Path) -> Generator:
    return Generator.load(workdir)
