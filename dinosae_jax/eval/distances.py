"""Every metric that compares two sets of features, and the number of images that it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from dinosae_jax.eval import frechet, inception_score, kernel_distance, precision_recall
from dinosae_jax.eval.features import FeatureNetwork, FeatureSet
from dinosae_jax.eval.recipe import check_comparable
from dinosae_jax.eval.results import Result

# Fewest generated images, and fewest reference images whose features are known.
SMALLEST = {
    "frechet": (2, 2),
    "interpolated_frechet": (2, 2),
    "spatial_frechet": (2, 2),
    "precision_recall": (4, 4),
    "inception_score": (inception_score.TORCH_FIDELITY_SPLITS, 0),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
      features: of its images; the moments may be those of more images than these.
      name: in words.
      sha256: of its file, or the fingerprint of a data set.
    """

    features: FeatureSet
    name: str
    sha256: str


def check_counts(
    metrics: Collection[str], generated: int, reference: int | None, subset_size: int
) -> None:
    """Raises ValueError, before anything is computed, if a metric needs more images.

    Args:
      metrics: the metrics wanted.
      generated: number of images that are measured.
      reference: number of reference images; None where it has moments alone.
      subset_size: images in a subset of the kernel distance.

    Raises:
      ValueError: with the number that the metric needs.
    """
    for metric in metrics:
        if metric == "kernel":
            needed = (subset_size, subset_size)
        elif metric in SMALLEST:
            needed = SMALLEST[metric]
        else:
            continue
        if generated < needed[0]:
            raise ValueError(
                f"the metric {metric} needs at least {needed[0]} images; got {generated}; make "
                f"more{_or_less(metric, generated)}"
            )
        without_images = ("frechet", "spatial_frechet", "inception_score")
        if reference is None and metric not in without_images:
            raise ValueError(
                f"the metric {metric} needs the reference's images; got a file of moments alone; "
                "give images as reference, or set metrics to frechet"
            )
        if reference is not None and reference < needed[1]:
            raise ValueError(
                f"the metric {metric} needs at least {needed[1]} reference images; got "
                f"{reference}; give a larger reference{_or_less(metric, reference)}"
            )


def _or_less(metric: str, count: int) -> str:
    if metric == "kernel" and count >= 2:
        return f", or pass --config.kernel_subset_size={count}"
    return ", or leave it out of metrics"


def distance(
    metric: str,
    network: FeatureNetwork,
    generated: FeatureSet,
    reference: Reference | None,
    prefix: str = "",
    subset_size: int = kernel_distance.SUBSET_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """The results of one metric: two for Precision/Recall and Inception Score, else one.

    Args:
      metric: a key of `network.metrics`.
      network: the network that made both sets.
      generated: the measured images.
      reference: what they are compared with; None where Inception Score is all.
      prefix: before the names of Frechet and kernel distance: 'r', 'g' or nothing.
      subset_size: of the kernel distance.
      progress: of Precision/Recall, called as progress(blocks done, blocks in all).

    Raises:
      ValueError: for features that cannot be compared, are too few or are not finite.
    """
    name, tap = network.metrics[metric]
    made = generated.moments[tap]
    about: dict[str, Any] = {"count": made.count, "recipe": dataclasses.asdict(made.recipe)}
    if metric == "inception_score":
        return _inception_scores(generated, tap, about)
    assert reference is not None
    known = reference.features.moments[tap]
    check_comparable(made.recipe, known.recipe)
    about |= {
        "reference": reference.name,
        "reference_hash": reference.sha256,
        "reference_count": known.count,
    }
    if metric == "precision_recall":
        return _precision_recall(generated, reference.features, tap, name, about, progress)
    if metric == "kernel":
        pair = (generated.features[tap], reference.features.features[tap])
        mean, spread = kernel_distance.kernel_distance(*pair, subset_size=subset_size)
        about["recipe"]["subsets"] = f"{kernel_distance.SUBSETS} of {subset_size}"
        about["reference_count"] = len(pair[1])
        return [Result(prefix + name, mean, spread=spread, **about)]
    value, form = frechet_of_sets(generated, reference.features, tap)
    about["recipe"]["form"] = form
    marked = "" if metric in ("spatial_frechet", "interpolated_frechet") else prefix
    return [Result(marked + name, value, **about)]


def frechet_of_sets(first: FeatureSet, second: FeatureSet, tap: str) -> tuple[float, str]:
    """The Frechet distance in the form that is exact for the counts, and the form's name."""
    sets = (first, second)
    counts = [side.moments[tap].count for side in sets]
    complete = all(len(side.index) == side.moments[tap].count for side in sets)
    if complete and min(counts) <= first.moments[tap].mean.size:
        value = frechet.frechet_distance_of_few(first.features[tap], second.features[tap])
        return value, "nuclear norm"
    return frechet.frechet_distance(first.moments[tap], second.moments[tap]), "symmetric eigen"


def _inception_scores(generated: FeatureSet, tap: str, about: dict[str, Any]) -> list[Result]:
    logits = generated.features[tap]
    split = min(inception_score.ADM_SPLIT_SIZE, len(logits))
    adm = inception_score.inception_score_adm(logits)
    mean, spread = inception_score.inception_score_torch_fidelity(logits)
    ways = {"IS": f"ADM, splits of {split} in order", "IS torch-fidelity": "10 shuffled splits"}
    recipes = [{**about["recipe"], "splits": way} for way in ways.values()]
    return [
        Result("IS", adm, about["count"], recipes[0]),
        Result("IS torch-fidelity", mean, about["count"], recipes[1], spread),
    ]


def _precision_recall(
    generated: FeatureSet,
    reference: FeatureSet,
    tap: str,
    name: str,
    about: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> list[Result]:
    pair = (reference.features[tap], generated.features[tap])
    counts = (len(pair[0]), len(pair[1]))
    protocol = "adm" if counts == precision_recall.ADM_COUNTS else "plain"
    scores = precision_recall.precision_recall(*pair, protocol, progress)
    about["recipe"]["protocol"] = f"{protocol}, k = {precision_recall.NEIGHBOURS}"
    about["reference_count"] = counts[0]
    named = zip(("precision", "recall"), scores, strict=True)
    return [Result(kind + name, score, **about) for kind, score in named]
