"""Linear probe in DINOv3's protocol: a grid of learning rates trained at once on frozen features.

Thirteen linear heads, one per rate, see the same batches. The gradient of the sum of their losses
separates by head, so one pass over the data trains all thirteen. For features that are in memory
there are a linear classifier, which keeps the best of the thirteen, and nearest neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

# Per 256 images in the batch (dinov3/eval/linear.py).
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
INIT_DEVIATION = 0.01
STEPS = 12_500  # 10 "epochs" of 1250

Heads = dict[str, jax.Array]  # kernel [r, d, k], bias [r, k]
Array = jax.Array | np.ndarray
Batches = Iterable[tuple[Array, Array]]  # features [b, d] float32, labels [b] int32


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Fractions of held-out images classified correctly, for each learning rate.

    Attributes:
      top1: [r], the likeliest class is right.
      top5: [r], the right class is among the five likeliest.
      count: number of images.
    """

    top1: np.ndarray
    top5: np.ndarray
    count: int

    @property
    def best(self) -> int:
        """The rate with the highest top-1, chosen on the held-out images as DINOv3 does."""
        return int(np.argmax(self.top1))


def probe_features(cls_token: jax.Array, patch_tokens: jax.Array) -> jax.Array:
    """The probe's features [b, 2d]: class token [b, d], then the mean of patch tokens [b, n, d].

    Tokens are those after the final norm; storage tokens are not used.
    """
    mean = jnp.mean(patch_tokens.astype(jnp.float32), axis=1)
    return jnp.concatenate([cls_token.astype(jnp.float32), mean], axis=-1)


def init_heads(key: jax.Array, width: int, classes: int, rates: int = len(LEARNING_RATES)) -> Heads:
    """Heads with kernels drawn from N(0, 0.01^2) and biases 0, in float32."""
    kernel = INIT_DEVIATION * jax.random.normal(key, (rates, width, classes))
    return {"kernel": kernel, "bias": jnp.zeros((rates, classes))}


def train_probe(heads: Heads, batches: Batches, batch_size: int, steps: int = STEPS) -> Heads:
    """Trains all heads by SGD with momentum 0.9, no decay, and a cosine to zero at `steps`.

    Args:
      heads: from `init_heads`, one for each of `LEARNING_RATES`; its buffers are donated.
      batches: at least `steps` pairs of features [batch_size, d] and labels [batch_size].
      batch_size: scales the rates by batch_size / 256.
      steps: number of updates.

    Returns:
      The trained heads.

    Raises:
      ValueError: steps below 1, or batches that run out.
    """
    if steps < 1:
        raise ValueError(f"a probe needs at least 1 step; got {steps}; raise it")
    velocity = jax.tree.map(jnp.zeros_like, heads)
    taken = 0
    for step, (features, labels) in zip(range(steps), batches, strict=False):
        rate = batch_size / 256 * 0.5 * (1.0 + np.cos(np.pi * step / steps))
        heads, velocity = _update(heads, velocity, features, labels, jnp.float32(rate))
        taken = step + 1
    if taken < steps:
        raise ValueError(
            f"a probe of {steps} steps needs as many batches; got {taken}; repeat them"
        )
    return heads


def evaluate_probe(heads: Heads, batches: Batches) -> Accuracy:
    """Measures every head on batches of any sizes.

    Raises:
      ValueError: no images.
    """
    top1 = top5 = np.zeros(len(heads["bias"]))
    count = 0
    for features, labels in batches:
        correct1, correct5 = _correct(heads, features, labels)
        top1, top5 = top1 + np.asarray(correct1), top5 + np.asarray(correct5)
        count += len(labels)
    if not count:
        raise ValueError("a probe is evaluated on at least 1 image; got 0; pass held-out batches")
    return Accuracy(top1 / count, top5 / count, count)


def logits(heads: Heads, features: jax.Array) -> jax.Array:
    """Logits [r, b, k] of features [b, d] for every head."""
    product = jnp.einsum("bd,rdk->rbk", features.astype(jnp.float32), heads["kernel"])
    return product + heads["bias"][:, None]


class Classifier(NamedTuple):
    """A linear classifier of features whose dimensions are brought to mean 0 and deviation 1.

    Attributes:
      mean: [d].
      deviation: [d].
      kernel: [d, k].
      bias: [k].
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Classes [b] of features [b, d]."""
        scaled = (features - self.mean) / self.deviation
        return np.argmax(scaled @ self.kernel + self.bias, axis=-1)


def fit_classifier(
    known: NDArray[np.float32],
    labels: NDArray[np.integer],
    held_out: NDArray[np.float32],
    held_out_labels: NDArray[np.integer],
    steps: int = 1000,
    batch_size: int = 256,
) -> Classifier:
    """The best of the thirteen heads by top-1 on the held-out features, trained on known ones.

    Args:
      known: [n, d]; batches of it are drawn at random, with a fixed seed.
      labels: [n], from 0.
      held_out: [m, d].
      held_out_labels: [m].
      steps: number of updates.
      batch_size: features of an update.

    Raises:
      ValueError: see `train_probe` and `evaluate_probe`.
    """
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-6
    random = np.random.default_rng(0)
    rows = (random.integers(0, len(known), batch_size) for _ in range(steps))
    scaled = (known - mean) / deviation
    batches = ((scaled[row], labels[row].astype(np.int32)) for row in rows)
    heads = init_heads(jax.random.key(0), known.shape[1], int(labels.max()) + 1)
    heads = train_probe(heads, batches, batch_size, steps)
    asked = (held_out - mean) / deviation
    best = evaluate_probe(heads, [(asked, held_out_labels.astype(np.int32))]).best
    kernel, bias = (np.asarray(heads[name][best]) for name in ("kernel", "bias"))
    return Classifier(mean, deviation, kernel, bias)


def nearest_neighbours(
    known: NDArray[np.float32],
    labels: NDArray[np.integer],
    features: NDArray[np.float32],
    neighbours: int = 5,
) -> NDArray[np.int64]:
    """The class of most of the nearest known features by cosine; of equal counts the smallest.

    Args:
      known: [n, d], n at least `neighbours`.
      labels: [n], from 0.
      features: [m, d].
      neighbours: how many vote.

    Returns:
      Classes [m].
    """
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (features, known)]
    nearest = np.argsort(-(units[0] @ units[1].T), axis=-1, kind="stable")[:, :neighbours]
    votes = np.eye(int(labels.max()) + 1, dtype=np.int64)[labels[nearest]]
    return np.argmax(votes.sum(axis=1), axis=-1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _update(
    heads: Heads, velocity: Heads, features: jax.Array, labels: jax.Array, schedule: jax.Array
) -> tuple[Heads, Heads]:
    def loss(heads: Heads) -> jax.Array:
        scores = logits(heads, features)
        targets = jnp.broadcast_to(labels, scores.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.sum(jnp.mean(losses, axis=1))

    rates = schedule * jnp.asarray(LEARNING_RATES)
    gradients = jax.grad(loss)(heads)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradients)
    heads = jax.tree.map(
        lambda p, v: p - rates.reshape(-1, *[1] * (p.ndim - 1)) * v, heads, velocity
    )
    return heads, velocity


@jax.jit
def _correct(heads: Heads, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = logits(heads, features)
    likeliest = jax.lax.top_k(scores, min(5, scores.shape[-1]))[1]
    hits = likeliest == labels[None, :, None]
    return jnp.sum(hits[..., 0], axis=1), jnp.sum(jnp.any(hits, axis=-1), axis=1)
