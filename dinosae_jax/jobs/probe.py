"""Linear probe of the frozen teacher and student; writes results.json and results.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from dinosae_jax.data import images, loading
from dinosae_jax.eval import probe, results
from dinosae_jax.eval.protocols import inputs, provenance
from dinosae_jax.eval.recipe import check_features
from dinosae_jax.inference import batching
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models import autoencoder as autoencoder_lib
from dinosae_jax.runtime import console, precision, sharding

NETWORKS: dict[str, Callable[..., autoencoder_lib.EncoderOutput]] = {
    "teacher": autoencoder_lib.encode_teacher,
    "student": autoencoder_lib.encode,
}


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Probes both networks on the classes of a data set.

    Args:
      config: config of `configs/probe.py`.
      folder: folder of the results.

    Raises:
      ValueError: before training, for missing weights, a data set with fewer than 2 classes, or a
        batch that does not divide over the devices.
    """
    if config.steps < 1:
        raise ValueError(f"a probe needs at least 1 step; got steps={config.steps}; raise it")
    config = precision.resolve_config(config)
    source = inputs.open_weights(config)
    autoencoder = inputs.open_autoencoder(config, source)
    inputs.require_teacher(autoencoder)
    sharding.check_batch(config.batch_size, 1, autoencoder.mesh)
    train, held_out = (
        images.open_images(config.data, split, labelled=True) for split in ("train", "eval")
    )
    check_classes(train, held_out)
    provenance.prepare_workdir(config, folder)
    rows = []
    for name in NETWORKS:
        with precision.products_of(config.dtype):
            accuracy = probe_network(config, autoencoder, name, train, held_out)
        rows += describe(config, name, accuracy, held_out)
        console.report(f"{config.name}: {name} {100 * accuracy.top1[accuracy.best]:.2f}% top-1")
    for note in autoencoder.notes:
        console.report(f"{config.name}: {note}")
    about = {
        "kind": "linear probe",
        "model": config.init_from or "random",
        "checkpoint_step": provenance.checkpoint_step(source),
        "features": "class token, mean patch token",
        "dtype": config.dtype,
        "config_sha256": provenance.config_sha256(config),
        "commit": provenance.commit(),
        "notes": list(autoencoder.notes),
    }
    if jax.process_index() == 0:
        console.report(results.write(folder, about, rows))
        console.report(f"{config.name}: wrote {folder / 'results.json'}")


def check_classes(train: images.ImageSource, held_out: images.ImageSource) -> None:
    """Raises ValueError where the splits have different classes, or fewer than 2."""
    if train.label_names != held_out.label_names or train.num_classes < 2:
        raise ValueError(
            "a probe needs at least 2 classes, the same in both splits; got "
            f"{train.num_classes} for training and {held_out.num_classes} held out; name another "
            "data.source"
        )


def probe_network(
    config: ml_collections.ConfigDict,
    autoencoder: Autoencoder,
    name: str,
    train: images.ImageSource,
    held_out: images.ImageSource,
) -> probe.Accuracy:
    """Trains the heads on one network's features and measures them on the held-out images."""
    mesh = autoencoder.mesh
    extract = functools.partial(
        _compiled_features(autoencoder.modules, name), autoencoder.variables
    )
    key = jax.random.PRNGKey(config.seed)
    heads = probe.init_heads(key, 2 * autoencoder.convention.width, train.num_classes)
    batches = console.progress(
        f"{config.name} {name}",
        training_features(config, train, mesh, extract),
        config.steps * config.batch_size,
        config.batch_size,
    )
    placed = sharding.replicate(heads, mesh)
    trained = probe.train_probe(placed, batches, config.batch_size, config.steps)
    return probe.evaluate_probe(trained, held_out_features(config, held_out, mesh, extract))


def training_features(
    config: ml_collections.ConfigDict,
    source: images.ImageSource,
    mesh: jax.sharding.Mesh,
    extract: Callable[[jax.Array], jax.Array],
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Features and labels of augmented images, without end, on the devices.

    Raises:
      ValueError: for features that are not finite.
    """
    fields = ("image", "label")
    batches = loading.training_batches(source, config, mesh, fields, config.batch_size)
    placed = (sharding.put_batch(batch, mesh) for batch in batches)
    running = ((extract(batch["image"]), batch["label"]) for batch in placed)
    for rows, labels in batching.one_behind(running):
        if not jnp.isfinite(rows).all():  # waits: or the host would run ahead without bound
            raise ValueError(
                "a probe needs finite features; got NaN or infinity; check the weights, or pass "
                "--config.dtype=float32"
            )
        yield rows, labels


def held_out_features(
    config: ml_collections.ConfigDict,
    source: images.ImageSource,
    mesh: jax.sharding.Mesh,
    extract: Callable[[jax.Array], jax.Array],
) -> Iterator[tuple[Any, Any]]:
    """Features and labels of every held-out image, on the host.

    Raises:
      ValueError: for features that are not finite.
    """
    for batch in inputs.dataset_batches(source, config, mesh, len(source)):
        fields = {name: batch[name] for name in ("image", "label", "mask")}
        placed = sharding.put_batch(fields, mesh)
        mask = sharding.gather(placed["mask"])
        rows, labels = extract(placed["image"]), placed["label"]
        checked = check_features(sharding.gather(rows)[mask], 0, "a probe")
        yield checked, sharding.gather(labels)[mask]


def describe(
    config: ml_collections.ConfigDict,
    name: str,
    accuracy: probe.Accuracy,
    held_out: images.ImageSource,
) -> list[results.Result]:
    """Top-1 and top-5 in percent, at the rate that is best in top-1 (DINOv3's selection)."""
    recipe = {
        "learning_rate_per_256": probe.LEARNING_RATES[accuracy.best],
        "steps": config.steps,
        "batch_size": config.batch_size,
        "resolution": config.data.image_size,
        "selection": "best of 13 rates by top-1 of the held-out images",
        "top1_of_each_rate": [round(100 * float(value), 4) for value in accuracy.top1],
    }
    return [
        results.Result(
            f"{metric} {name}",
            100 * float(values[accuracy.best]),
            accuracy.count,
            recipe,
            reference=f"{config.data.source} eval",
            reference_hash=held_out.fingerprint,
        )
        for metric, values in (("top-1", accuracy.top1), ("top-5", accuracy.top5))
    ]


@functools.lru_cache
def _compiled_features(
    modules: autoencoder_lib.AutoencoderModules, name: str
) -> Callable[..., jax.Array]:
    @jax.jit
    def extract(variables: Any, image: jax.Array) -> jax.Array:
        output = NETWORKS[name](modules, variables, autoencoder_lib.unit_interval(image))
        return probe.probe_features(output.cls, output.tokens)

    return extract
