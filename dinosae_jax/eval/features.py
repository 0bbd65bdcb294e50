"""Features of images by a frozen network: on all devices, with statistics that merge.

A `FeatureNetwork` describes the network; a `Collector` gathers the features of one set of images,
batch by batch. The result does not depend on the size of the batches, on the devices or on the
order of hosts: every row has its image's global index, rows without an image are dropped, and
moments are summed in float64 over blocks of fixed length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dinosae_jax import names
from dinosae_jax.data.adm_npz import Archive
from dinosae_jax.eval import frechet
from dinosae_jax.eval.recipe import Recipe
from dinosae_jax.inference import batching
from dinosae_jax.models import autoencoder
from dinosae_jax.models.efficientnet import EfficientNetLite0
from dinosae_jax.models.inception import InceptionFID
from dinosae_jax.runtime import sharding

Tree = Any
Batch = dict[str, np.ndarray]  # image uint8 [b, h, w, 3], index [b], mask bool [b]

BLOCK = 1000  # rows whose moments are computed at once
PIPELINES: dict[names.InceptionResize, str] = {
    "tf1_bilinear": "tf1",
    "half_pixel_bilinear": "pytorch_fid",
}
INCEPTION_TAPS = {"pool3": "2048", "spatial": "spatial", "logits": "logits_unbiased"}
EFFICIENTNET_TAP = "pool"
ENCODER_TAP = "mean_patch_token"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network that turns images into features.

    Attributes:
      name: the name in every recipe.
      sha256: of its weights.
      resize: as of `Recipe.resize`.
      metrics: metric -> (name in the results, tap it is computed from), without the metrics that
        the network cannot give.
      variables: of the network, a copy on every device.
      apply: (variables, uint8 [b, h, w, 3]) -> {tap: float32 [b, d]}.
    """

    name: str
    sha256: str
    resize: str
    metrics: Mapping[str, tuple[str, str]]
    variables: Tree
    apply: Callable[[Tree, jax.Array], dict[str, jax.Array]]

    def recipe(self, tap: str, **about: Any) -> Recipe:
        """The recipe of one tap; `about` says which images (fields of `Recipe`)."""
        return Recipe(self.name, tap, self.resize, network_sha256=self.sha256, **about)

    def __call__(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        """Features {tap: float32 [b, d]} of images uint8 [b, h, w, 3], spread as the images are."""
        return _compiled(self.apply, taps)(self.variables, images)


def inception(
    variables: Tree,
    sha256: str,
    resize: str = "tf1_bilinear",
    mesh: jax.sharding.Mesh | None = None,
) -> FeatureNetwork:
    """The network of FID, its spatial form, Inception Score, KID and Precision/Recall.

    Args:
      variables: of `InceptionFID`.
      sha256: of the file that the weights were converted from.
      resize: 'tf1_bilinear' (ADM, torch-fidelity) or 'half_pixel_bilinear' (pytorch-fid).
      mesh: where the variables are copied to; the first device where it is None.

    Raises:
      ValueError: unknown resize.
    """
    if resize not in PIPELINES:
        raise ValueError(
            f"Inception's resize is one of {', '.join(PIPELINES)}; got {resize!r}; choose one of "
            "these"
        )
    network = InceptionFID(PIPELINES[resize])

    def apply(variables: Tree, images: jax.Array) -> dict[str, jax.Array]:
        taps: Any = network.apply(variables, images)
        return {name: taps[theirs] for name, theirs in INCEPTION_TAPS.items()}

    metrics = {
        "frechet": ("FID", "pool3"),
        "interpolated_frechet": ("iFID", "pool3"),
        "kernel": ("KID", "pool3"),
        "precision_recall": ("", "pool3"),
        "spatial_frechet": ("sFID", "spatial"),
        "inception_score": ("IS", "logits"),
    }
    return FeatureNetwork("inception_fid", sha256, resize, metrics, _place(variables, mesh), apply)


def efficientnet(
    variables: Tree, sha256: str, mesh: jax.sharding.Mesh | None = None
) -> FeatureNetwork:
    """EfficientNet-Lite0's pooled features, a pretrained space without a gated download.

    Images of any size are resized to 224 pixels, bilinear with half-pixel centres, and scaled to
    (x - 127) / 128. Distances are called 'FD EfficientNet-Lite0' and 'KID EfficientNet-Lite0',
    never FID: they compare with nothing but distances by the same weights.

    Args:
      variables: of `EfficientNetLite0`.
      sha256: of these weights.
      mesh: where the variables are copied to; the first device where it is None.
    """
    network = EfficientNetLite0()

    def apply(variables: Tree, images: jax.Array) -> dict[str, jax.Array]:
        taps: Any = network.apply(variables, images)
        return taps

    name, resize = "efficientnet_lite0", "half_pixel_bilinear"
    metrics = _distances_in("EfficientNet-Lite0", EFFICIENTNET_TAP)
    return FeatureNetwork(name, sha256, resize, metrics, _place(variables, mesh), apply)


def encoder(
    modules: autoencoder.AutoencoderModules,
    variables: Tree,
    sha256: str,
    mesh: jax.sharding.Mesh | None = None,
) -> FeatureNetwork:
    """An autoencoder's own encoder: the mean patch token, in float32 whatever it was trained in.

    Distances in this space are called 'FD encoder' and 'KID encoder', never FID: they compare with
    nothing but distances by the same weights.

    Args:
      modules: the autoencoder's; its stem and ViT are used.
      variables: roles stem and vit.
      sha256: of these weights.
      mesh: where the variables are copied to; the first device where it is None.
    """
    exact = dataclasses.replace(
        modules,
        stem=modules.stem.clone(dtype=jnp.float32),
        vit=modules.vit.clone(dtype=jnp.float32),
    )

    def apply(variables: Tree, images: jax.Array) -> dict[str, jax.Array]:
        with jax.default_matmul_precision("highest"):
            pixels = autoencoder.unit_interval(images)
            tokens = autoencoder.encode(exact, variables, pixels).tokens
        return {ENCODER_TAP: jnp.mean(tokens, axis=1)}

    metrics = _distances_in("encoder", ENCODER_TAP)
    roles = _place({role: variables[role] for role in ("stem", "vit")}, mesh)
    return FeatureNetwork("dinosae-encoder", sha256, "adm_centre_crop", metrics, roles, apply)


def _distances_in(space: str, tap: str) -> dict[str, tuple[str, str]]:
    """The metrics of a space that is not FID's, each with its name."""
    return {
        "frechet": (f"FD {space}", tap),
        "interpolated_frechet": (f"iFD {space}", tap),
        "kernel": (f"KID {space}", tap),
        "precision_recall": (f" {space}", tap),
    }


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """The features of one set of images.

    Attributes:
      features: tap -> float32 [m, d], the rows that were kept, by rising index.
      index: int64 [m], the global index of each row.
      moments: tap -> moments of all rows, with the recipe.
    """

    features: dict[str, NDArray[np.float32]]
    index: NDArray[np.int64]
    moments: dict[str, frechet.Statistics]


class Collector:
    """Gathers the features of one set of images."""

    def __init__(
        self, recipes: Mapping[str, Recipe], keep: NDArray[np.integer] | None = None
    ) -> None:
        """Starts with no rows.

        Args:
          recipes: tap -> recipe; the taps that are gathered.
          keep: global indices of the rows whose features are kept; None keeps all.
        """
        self.taps = tuple(recipes)
        self._recipes = dict(recipes)
        self._keep = keep
        self._pending: dict[str, list[np.ndarray]] = {tap: [] for tap in recipes}
        self._moments: dict[str, frechet.Statistics] = {}
        self._kept: dict[str, list[np.ndarray]] = {tap: [] for tap in recipes}
        self._index: list[np.ndarray] = []

    def add(self, features: Mapping[str, np.ndarray], index: np.ndarray, mask: np.ndarray) -> None:
        """Takes one batch.

        Args:
          features: tap -> [b, d].
          index: [b], global indices of the images.
          mask: [b], False for rows that only fill the batch.

        Raises:
          ValueError: a feature that is not finite.
        """
        rows = np.flatnonzero(mask)
        rows = rows[np.argsort(index[rows], kind="stable")]
        kept = rows if self._keep is None else rows[np.isin(index[rows], self._keep)]
        self._index.append(np.asarray(index[kept], np.int64))
        for tap in self._recipes:
            self._kept[tap].append(np.asarray(features[tap][kept], np.float32))
            self._pending[tap].append(features[tap][rows])
            self._reduce(tap, BLOCK)

    def finish(self) -> FeatureSet:
        """The features of all batches.

        Raises:
          ValueError: no rows, or a feature that is not finite.
        """
        for tap in self._recipes:
            self._reduce(tap, 1)
        if not self._moments:
            raise ValueError("features need at least 1 image; got 0; check the source of images")
        index = np.concatenate(self._index)
        order = np.argsort(index, kind="stable")
        features = {tap: np.concatenate(rows)[order] for tap, rows in self._kept.items()}
        return FeatureSet(features, index[order], dict(self._moments))

    def _reduce(self, tap: str, fewest: int) -> None:
        """Moves full blocks (`fewest` = BLOCK) or all rows (1) from `_pending` to `_moments`."""
        if sum(map(len, self._pending[tap])) < fewest:
            return
        rows = np.concatenate(self._pending[tap])
        while len(rows) >= fewest:
            block = frechet.statistics(rows[:BLOCK], self._recipes[tap])
            before = self._moments.get(tap)
            self._moments[tap] = frechet.merge(before, block) if before else block
            rows = rows[BLOCK:]
        self._pending[tap] = [rows]


def extract(
    network: FeatureNetwork, batches: Iterable[dict[str, jax.Array]], collector: Collector
) -> FeatureSet:
    """Runs images through a network, every batch over all devices.

    Args:
      network: the feature network.
      batches: image, index and mask, spread over the devices (`place`).
      collector: a collector of the taps that are wanted.

    Returns:
      The features of all processes' images, on every process.

    Raises:
      ValueError: a feature that is not finite, or no images.
    """
    taps = collector.taps
    running = ({**batch, "taps": network(batch["image"], taps)} for batch in batches)
    for done in batching.one_behind(running):
        features = {tap: sharding.gather(rows) for tap, rows in done["taps"].items()}
        collector.add(features, sharding.gather(done["index"]), sharding.gather(done["mask"]))
    return collector.finish()


def place(batches: Iterable[Batch], mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """Moves this process's rows of global batches to its devices.

    Args:
      batches: image, index and mask; the size of a global batch is a multiple of the devices.
      mesh: the devices.

    Yields:
      The same fields, indices as int32.
    """
    for batch in batches:
        index = batch["index"].astype(np.int32)
        fields = {"image": batch["image"], "index": index, "mask": batch["mask"]}
        yield sharding.put_batch(fields, mesh)


def archive_batches(archive: Archive, batch_size: int, rows: NDArray[np.int64]) -> Iterator[Batch]:
    """Rows of the batches of an .npz in its order, the last batch padded with black images."""
    for number, images in enumerate(archive.batches(batch_size)):
        filled = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images
        index = number * batch_size + np.arange(batch_size)
        mask = np.arange(batch_size) < len(images)
        yield {"image": filled[rows], "index": index[rows], "mask": mask[rows]}


@functools.lru_cache
def _compiled(apply: Callable[..., Any], taps: tuple[str, ...]) -> Callable[..., Any]:
    def chosen(variables: Tree, images: jax.Array) -> dict[str, jax.Array]:
        features = apply(variables, images)
        return {tap: features[tap].astype(jnp.float32) for tap in taps}

    return jax.jit(chosen)


def _place(variables: Tree, mesh: jax.sharding.Mesh | None) -> Tree:
    return sharding.replicate(variables, mesh) if mesh else jax.device_put(variables)
