"""Measures an autoencoder, a flow or an .npz of samples, and states the recipe of each result.

A workdir holds config.json, results.json, results.md, for a flow samples/ (the sample job's
workdir, which resumes where it was interrupted), and reference_TAP.npz: the moments of a data set
used as reference, which a later run takes as `reference`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from etils import epath

from dinosae_jax import config as config_lib
from dinosae_jax import names, spelling
from dinosae_jax.data import adm_npz
from dinosae_jax.eval import features, results
from dinosae_jax.eval.protocols import generated, inputs, provenance, reconstructions
from dinosae_jax.eval.protocols.inputs import Subject
from dinosae_jax.eval.protocols.references import local_npz
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.runtime import console, precision, sharding
from dinosae_jax.weights import weight_source

CONVERT_INCEPTION = names.CONVERSIONS["inception"].command()
CONVERT_EFFICIENTNET = names.CONVERSIONS["efficientnet"].command()
IMAGE_METRICS = ("psnr", "ssim", "lpips")
SAMPLE_METRICS = (
    "frechet",
    "spatial_frechet",
    "inception_score",
    "precision_recall",
    "kernel",
)
METRICS = (*IMAGE_METRICS, *SAMPLE_METRICS, "interpolated_frechet")


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Measures what the config names and writes the results.

    Args:
      config: config of `configs/evaluate.py`.
      folder: folder of the results.

    Raises:
      ValueError: before long work, for unreadable inputs, metrics that are not possible, too few
        images, or a reference of another recipe or resolution.
      stopping.Interrupted: after a signal while samples are drawn, with every finished chunk saved.
    """
    config = precision.resolve_config(config)
    subject = open_subject(config)
    mesh = sharding.make_mesh()
    with precision.products_of(config.dtype):
        network = open_network(config, subject, mesh)
    metrics = choose_metrics(config, subject.kind, network)
    provenance.prepare_workdir(config, folder)
    about = describe(config, subject, network)
    with noted_warnings(about["notes"]), precision.products_of(config.dtype):
        job = reconstructions if subject.kind == "autoencoder" else generated
        measured = job.run(config, subject, network, metrics, mesh, folder)
    for note in about["notes"]:
        console.report(f"{config.name}: {note}")
    if jax.process_index() == 0:
        console.report(results.write(folder, about, measured))
        console.report(f"{config.name}: wrote {folder / 'results.json'}")


def open_subject(config: ml_collections.ConfigDict) -> Subject:
    """Opens what is measured.

    Raises:
      ValueError: for both or none of init_from and samples, or what cannot be read.
    """
    if config.samples and config.init_from not in ("", config_lib.AUTOENCODER_RUN):
        raise ValueError(
            "one subject is measured at a time; got both init_from and samples; leave one of them "
            "out (`encoder` names the weights for features)"
        )
    if config.samples:
        path = local_npz("samples", config.samples)
        return Subject("samples", path.name, None, None, adm_npz.open_archive(path))
    source = inputs.open_weights(config)
    name = config.init_from or "random"
    if "dit" in source.variables and source.flow:
        return Subject("flow", name, source, None, None)
    return Subject("autoencoder", name, source, inputs.open_autoencoder(config, source), None)


def open_network(
    config: ml_collections.ConfigDict, subject: Subject, mesh: jax.sharding.Mesh
) -> features.FeatureNetwork:
    """The network that `inputs.feature_network` chooses, with a note where it is the encoder.

    Raises:
      ValueError: where there is neither a pretrained network nor an encoder.
    """
    open_encoder = functools.partial(_open_encoder, config, subject)
    return inputs.feature_network(config.weights, mesh, open_encoder, config.resize)


def _open_encoder(config: ml_collections.ConfigDict, subject: Subject) -> Autoencoder:
    source = weight_source.open_weights(config.encoder) if config.encoder else subject.source
    if source is None:
        raise ValueError(
            "features need a network; got samples without weights.inception, weights.efficientnet "
            f"and encoder; convert FID's Inception with `{CONVERT_INCEPTION}` and pass "
            "--config.weights.inception=weights/inception, or EfficientNet-Lite0 with "
            f"`{CONVERT_EFFICIENTNET}` and pass --config.weights.efficientnet="
            "weights/efficientnet, or name an autoencoder in --config.encoder=..."
        )
    console.report(
        f"{config.name}: no FID-Inception weights, so there is no FID; distances are measured in "
        "the encoder's own features (FD encoder, KID encoder). To get FID: "
        f"`{CONVERT_INCEPTION}`, then --config.weights.inception=weights/inception. To get "
        f"pretrained features without a gated download: `{CONVERT_EFFICIENTNET}`, then "
        "--config.weights.efficientnet=weights/efficientnet"
    )
    if config.encoder or not subject.autoencoder:
        return inputs.open_autoencoder(config, source)
    return subject.autoencoder


def choose_metrics(
    config: ml_collections.ConfigDict, kind: str, network: features.FeatureNetwork
) -> tuple[str, ...]:
    """The metrics of the config, or all that subject, network and reference allow.

    Raises:
      ValueError: for a metric that is unknown or not possible here.
    """
    for metric in config.metrics:
        if metric not in METRICS:
            hint = spelling.nearest(metric, METRICS)
            raise ValueError(f"metrics must be known metrics; got {metric!r}{hint}")
        if kind != "autoencoder" and metric in (*IMAGE_METRICS, "interpolated_frechet"):
            raise ValueError(
                f"the metric {metric} compares images with their reconstructions; got {kind}; "
                "leave it out or name an autoencoder"
            )
        if metric == "lpips" and not config.weights.lpips:
            raise ValueError(
                "the metric lpips needs weights; got none (weights.lpips is empty); convert them "
                f"with `{names.CONVERSIONS['lpips'].command()}`"
            )
        if metric not in (*IMAGE_METRICS, *network.metrics):
            raise ValueError(
                f"the metric {metric} needs FID's Inception; got {network.name}; convert it with "
                f"`{CONVERT_INCEPTION}` and pass --config.weights.inception=weights/inception"
            )
    if config.metrics:
        return tuple(config.metrics)
    if kind == "autoencoder":
        with_lpips = IMAGE_METRICS if config.weights.lpips else IMAGE_METRICS[:2]
        return (*with_lpips, "frechet", "kernel")
    return tuple(metric for metric in SAMPLE_METRICS if metric in network.metrics)


def describe(
    config: ml_collections.ConfigDict, subject: Subject, network: features.FeatureNetwork
) -> dict[str, Any]:
    """What all results of a run share."""
    about: dict[str, Any] = {
        "kind": subject.kind,
        "model": subject.name,
        "checkpoint_step": None,
        "sampler": "",
        "steps": None,
        "features": f"{network.name}, {network.resize}",
        "dtype": config.dtype if subject.source else "",
        "config_sha256": provenance.config_sha256(config),
        "commit": provenance.commit(),
        "notes": [],
    }
    if subject.source:
        about["checkpoint_step"] = provenance.checkpoint_step(subject.source)
        about["notes"] = list(subject.source.notes)
    if subject.source and subject.kind == "flow":
        given = {k: v for k, v in config.sample.sampling.to_dict().items() if v is not None}
        own = {"decode_radius": subject.source.convention["decode_radius"]}
        about |= {**own, **subject.source.flow["sampling"], **given}
        about["labels"], about["seed"] = config.sample.labels, config.seed
    return about


@contextlib.contextmanager
def noted_warnings(notes: list[str]) -> Iterator[None]:
    """Adds the metrics' warnings to the notes of the results."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning) and str(warning.message) not in notes:
            notes.append(str(warning.message))
