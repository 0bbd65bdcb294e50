"""What made a set of features: stored with every result, and compared before two sets are."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Two sets of features are comparable where these fields agree. The other fields say what was
# measured: a reference is 8-bit from the start, and has its own count and labels.
COMPARED = ("network", "network_sha256", "tap", "resize", "resolution")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How features were made; the empty string and 0 mean "not known".

    Attributes:
      network: feature network: 'inception_fid', 'efficientnet_lite0' or 'dinosae-encoder'.
      network_sha256: hash of its weights; published reference files do not state it.
      tap: which activation, e.g. 'pool3', 'spatial' (sFID's 2023), 'logits'.
      resize: 'tf1_bilinear' (ADM, torch-fidelity) or 'half_pixel_bilinear' (pytorch-fid) for
        Inception, the latter for EfficientNet; the crop for an encoder.
      resolution: side of the images in pixels before that resize.
      uint8_conversion: a name of `image_quality.UINT8_CONVERSIONS`, or 'stored' for images that
        were 8-bit on disk.
      count: number of images.
      images: where they come from, e.g. 'imagenet2012 validation', 'samples'.
      labels: how labels were drawn, e.g. 'balanced', 'random'.
    """

    network: str
    tap: str
    resize: str
    resolution: int = 0
    network_sha256: str = ""
    uint8_conversion: str = ""
    count: int = 0
    images: str = ""
    labels: str = ""

    def to_json(self) -> str:
        """The recipe as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
          ValueError: for any other text.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"a recipe is JSON of the fields of `Recipe`; got {text[:80]!r}; make the file "
                "again"
            ) from None


def check_comparable(first: Recipe, second: Recipe) -> None:
    """Raises ValueError if a field of `COMPARED` is known in both recipes and differs."""
    for name in COMPARED:
        here, there = getattr(first, name), getattr(second, name)
        if here and there and here != there:
            raise ValueError(
                "features can only be compared when one recipe made both; got "
                f"{name} {here!r} and {there!r}; compute one side again with the other's recipe"
            )


def check_features(features: ArrayLike, fewest: int, metric: str) -> NDArray[np.floating]:
    """Returns features as an array [n, d], checked for layout, number and finiteness.

    Raises:
      ValueError: not [n, d], fewer than `fewest` rows, or a NaN or infinity.
    """
    array = np.asarray(features)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{metric} needs floating point features [n, d]; got {array.dtype} "
            f"{list(array.shape)}; convert or reshape them"
        )
    if len(array) < fewest:
        raise ValueError(f"{metric} needs at least {fewest} samples; got {len(array)}; make more")
    finite = np.isfinite(array.sum(axis=1, dtype=np.float64))
    if not finite.all():
        raise ValueError(
            f"{metric} needs finite features; got NaN or infinity in {np.sum(~finite)} of "
            f"{len(array)} rows (first: {np.argmin(finite)}); check those images and the weights"
        )
    return array


def check_pair(
    first: ArrayLike, second: ArrayLike, fewest: int, metric: str
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Returns two sets of features as arrays [n, d] and [m, d] after `check_features` of each.

    Raises:
      ValueError: as `check_features`, or sets of different dimensions.
    """
    x, y = (check_features(side, fewest, metric) for side in (first, second))
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{metric} needs features of one dimension; "
            f"got {x.shape[1]} and {y.shape[1]}; use one tap for both"
        )
    return x, y
