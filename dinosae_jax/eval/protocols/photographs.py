"""What a comparison measures against: held-out photographs, and those that classes come from."""

from __future__ import annotations

import functools

import ml_collections
import numpy as np
from numpy.typing import NDArray

from dinosae_jax.data import images
from dinosae_jax.eval import features, frechet, kernel_distance, probe
from dinosae_jax.eval.protocols.scores import Score
from dinosae_jax.inference.batching import map_batches
from dinosae_jax.runtime import sharding

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int32]


class Photographs:
    """Held-out photographs with their features, and a classifier of pictures.

    Attributes:
      held_out: uint8 [n, h, w, 3].
      labels: int32 [n], their classes.
      known: uint8 [m, h, w, 3], training images.
      known_labels: int32 [m], their classes.
      features: float32 [n, d] of the held-out photographs.
      classify: fitted on the features of `known`; features [b, d] -> classes [b].
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        data: ml_collections.ConfigDict,
        network: features.FeatureNetwork,
    ):
        """Reads the photographs, computes their features and fits the classifier.

        Args:
          config: images, known, batch_size, kernel_subsets, kernel_subset_size.
          data: where the photographs are, and their crop.
          network: makes the features of the distances and of the classifier.

        Raises:
          ValueError: for data that cannot be read or have no labels.
        """
        self.config, self.network = config, network
        self.tap = network.metrics["frechet"][1]
        self.mesh = sharding.make_mesh()
        self.held_out, self.labels = read(data, "eval", config.images)
        self.known, self.known_labels = read(data, "train", config.known)
        self.features, self._known_features = map(self.embed, (self.held_out, self.known))
        self.classify = probe.fit_classifier(
            self._known_features, self.known_labels, self.features, self.labels
        )

    def embed(self, pixels: Pixels) -> NDArray[np.float32]:
        """Features [b, d] of pictures uint8 [b, h, w, 3]."""
        apply = functools.partial(self.network, taps=(self.tap,))
        return map_batches(apply, pixels, self.config.batch_size, self.mesh)[self.tap]

    def measure(self, embedded: NDArray[np.float32], labels: Labels) -> Score:
        """Distances of pictures to the held-out photographs, and how many show their class.

        Args:
          embedded: [b, d], features of the pictures.
          labels: [b].
        """
        size = min(self.config.kernel_subset_size, len(embedded), len(self.features))
        kernel, _ = kernel_distance.kernel_distance(
            embedded, self.features, self.config.kernel_subsets, size
        )
        return {
            "frechet": frechet.frechet_distance_of_few(embedded, self.features),
            "kernel": 1e3 * kernel,
            "class_of_image": float(np.mean(self.classify(embedded) == labels)),
        }

    def floor(self, count: int) -> Score:
        """What `count` training photographs get: no picture can be expected to do better.

        Their classes are those that the classifier was fitted on, so of these the held-out
        photographs tell.
        """
        rows = spread(count, len(self.known))
        distances = self.measure(self._known_features[rows], self.known_labels[rows])
        told = float(np.mean(self.classify(self.features) == self.labels))
        return distances | {"class_of_image": told}


def read(data: ml_collections.ConfigDict, split: str, count: int) -> tuple[Pixels, Labels]:
    """The evaluation crops and classes of `count` images (all, if there are fewer) of a split.

    They are spread evenly over the split, whose order is that of its classes.

    Raises:
      ValueError: for data that cannot be read or have no labels.
    """
    source = images.open_images(data, split, labelled=True)
    crop = images.recipe_of(data).evaluate
    found = [source[int(number)] for number in spread(count, len(source))]
    pixels, labels = ([each[field] for each in found] for field in ("image", "label"))
    return np.stack([crop(image) for image in pixels]), np.stack(labels)


def spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` numbers from 0 to total - 1 at equal distances; all of them where count is larger."""
    count = min(count, total)
    return np.arange(count) * total // count
