"""The scores of a comparison, kept in one file with the recipe that they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax.eval import features
from dinosae_jax.runtime import console, files

Score = dict[str, float]

# Fields whose change leaves scores valid; what the weights give is in the features' hash.
GROWING = ("order", "once", "arms", "seeds", "guidances", "sweep", "compile_cache", "weights")


def recipe_of(
    config: ml_collections.ConfigDict, network: features.FeatureNetwork
) -> dict[str, Any]:
    """What all scores of a file have in common: training, features, numbers of images."""
    kept = {name: value for name, value in config.to_dict().items() if name not in GROWING}
    return json.loads(json.dumps({**kept, "features": [network.name, network.sha256]}))


def key_of(arm: str, seed: int) -> str:
    """The name of a trained arm in scores.json; a flow's settings follow it."""
    return f"{arm}, seed {seed}"


def workdir_of(folder: epath.Path, arm: str, seed: int) -> epath.Path:
    """The folder of the run of an arm with a seed, in that of its comparison."""
    return folder / arm / f"seed{seed}"


class Scores:
    """Scores by key."""

    def __init__(self, path: epath.Path, recipe: dict[str, Any]):
        """Reads what the file holds.

        Raises:
          ValueError: where it holds scores of another recipe.
        """
        self.path, self.recipe = path, recipe
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

    def add(self, key: str, measure: Callable[[], Score]) -> None:
        """Adds what `measure` returns, unless the key has a score."""
        if key in self.scores:
            return
        self.scores[key] = score = measure()
        if jax.process_index() == 0:
            files.write_json(self.path, {"recipe": self.recipe, "scores": self.scores})
        console.report(f"{key}: " + "  ".join(f"{n} {value:.4g}" for n, value in score.items()))
