"""Trained autoencoders compared: reconstruction, meaning, and what norms and directions carry.

Meaning is measured as the class of held-out images, told by classifiers that are fitted on training
images: from the mean patch token of each encoder (a linear classifier, and nearest neighbours), and
from a pretrained network's features of decoded images, which no encoder had a part in.

The paper's premise is that the direction of a token carries meaning and its norm detail. So every
held-out image is also decoded from its own directions with the norms of an image of another class.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from numpy.typing import NDArray

from dinosae_jax.data import png
from dinosae_jax.eval import features, image_quality, probe
from dinosae_jax.eval.protocols.photographs import Labels, Photographs, Pixels
from dinosae_jax.eval.protocols.scores import Score
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models.autoencoder import unit_interval

Floats = NDArray[np.float32]


class Judge:
    """Measures autoencoders on one set of held-out images."""

    def __init__(self, config: ml_collections.ConfigDict, network: features.FeatureNetwork):
        """Opens the photographs.

        Args:
          config: config of `configs/ablation_sae.py`.
          network: see `Photographs`.

        Raises:
          ValueError: see `Photographs`; also where an image has no partner of another class.
        """
        self.photographs = Photographs(config, config.base.data, network)
        self.partner = _partners(self.photographs.labels)

    def teacher(self, autoencoder: Autoencoder) -> Score:
        """How well the teacher's tokens tell the classes."""
        held_out, known = (
            autoencoder.encode_teacher(unit_interval(pixels)).mean(axis=1)
            for pixels in (self.photographs.held_out, self.photographs.known)
        )
        return self._classes(self._fit(known, held_out), known, held_out)

    def __call__(self, autoencoder: Autoencoder) -> Score:
        """Everything of one autoencoder; `report.comparison_tables` says what the names mean."""
        photographs = self.photographs
        z = autoencoder.encode(unit_interval(photographs.held_out))
        held_out = z.mean(axis=1)
        known = autoencoder.encode(unit_interval(photographs.known)).mean(axis=1)
        classify = self._fit(known, held_out)
        made = _decode(autoencoder, z)
        embedded = photographs.embed(made)
        return {
            "psnr": _psnr(made, photographs.held_out),
            "ssim": _mean(image_quality.ssim, made, photographs.held_out),
            "distance": float(np.mean(1.0 - _cosine(embedded, photographs.features))),
            **photographs.measure(embedded, photographs.labels),
            **self._classes(classify, known, held_out),
            **self._exchanged(autoencoder, z, classify),
        }

    def _exchanged(self, autoencoder: Autoencoder, z: Floats, classify: probe.Classifier) -> Score:
        """Own directions with another image's norms, and with one norm for all tokens."""
        photographs, partner = self.photographs, self.partner
        own, other = photographs.labels, photographs.labels[partner]
        norms = np.linalg.norm(z, axis=-1, keepdims=True)
        mixed, even = z / norms * norms[partner], z / norms * norms.mean()
        of_mixed, of_even = (_decode(autoencoder, latents) for latents in (mixed, even))
        told = classify(mixed.mean(axis=1))
        seen, seen_even = (
            photographs.classify(photographs.embed(made)) for made in (of_mixed, of_even)
        )
        return {
            "mixed_psnr_direction": _psnr(of_mixed, photographs.held_out),
            "mixed_psnr_norm": _psnr(of_mixed, photographs.held_out[partner]),
            "mixed_class_direction": _part(told, own),
            "mixed_class_norm": _part(told, other),
            "mixed_class_of_image_direction": _part(seen, own),
            "mixed_class_of_image_norm": _part(seen, other),
            "even_psnr": _psnr(of_even, photographs.held_out),
            "even_class_of_image": _part(seen_even, own),
        }

    def _fit(self, known: Floats, held_out: Floats) -> probe.Classifier:
        photographs = self.photographs
        return probe.fit_classifier(known, photographs.known_labels, held_out, photographs.labels)

    def _classes(self, classify: probe.Classifier, known: Floats, held_out: Floats) -> Score:
        nearest = probe.nearest_neighbours(known, self.photographs.known_labels, held_out)
        return {
            "neighbours": _part(nearest, self.photographs.labels),
            "linear": _part(classify(held_out), self.photographs.labels),
        }


def _decode(autoencoder: Autoencoder, z: Floats) -> Pixels:
    return png.as_picture(autoencoder.decode(z))


def _psnr(made: Pixels, pixels: Pixels) -> float:
    return _mean(image_quality.psnr, made, pixels)


def _mean(quality: Callable[..., jax.Array], made: Pixels, pixels: Pixels) -> float:
    ours, theirs = (jnp.asarray(unit_interval(each)) for each in (made, pixels))
    return float(quality(ours, theirs).mean())


def _cosine(a: Floats, b: Floats) -> Floats:
    return np.sum(a * b, axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _part(classes: NDArray[np.integer], labels: Labels) -> float:
    return float(np.mean(classes == labels))


def _partners(labels: Labels) -> NDArray[np.int64]:
    """For each image the index of one of another class; every image is the partner of one.

    Raises:
      ValueError: where more than half of the images are of one class.
    """
    order = np.argsort(labels, kind="stable")
    partner = np.empty(len(labels), np.int64)
    partner[order] = np.roll(order, -int(np.bincount(labels).max()))
    if (labels[partner] == labels).any():
        raise ValueError(
            "norms are exchanged with images of other classes, so no class may have more than half "
            f"of the images; got {np.bincount(labels).max()} of {len(labels)}; measure more images"
        )
    return partner
