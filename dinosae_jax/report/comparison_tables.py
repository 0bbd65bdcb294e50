"""The tables of a comparison of autoencoders or flows, and the figure of one of flows."""

from __future__ import annotations

import functools

import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import png
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import flow_comparison
from dinosae_jax.eval.protocols.scores import Score, key_of, workdir_of
from dinosae_jax.report import curves, pictures

EXCHANGED = {
    "mixed_psnr_direction": "PSNR to the image of the directions (dB)",
    "mixed_psnr_norm": "PSNR to the image of the norms (dB)",
    "even_psnr": "PSNR with one norm for all tokens (dB)",
    "mixed_class_direction": "tokens: class of the directions (%)",
    "mixed_class_norm": "tokens: class of the norms (%)",
    "mixed_class_of_image_direction": "decoded: class of the directions (%)",
    "mixed_class_of_image_norm": "decoded: class of the norms (%)",
    "even_class_of_image": "decoded, one norm for all tokens: own class (%)",
}


def autoencoder_tables(
    config: ml_collections.ConfigDict, scores: dict[str, Score], network: features.FeatureNetwork
) -> str:
    """Two Markdown tables: reconstruction and meaning; what norms and directions carry.

    Args:
      config: config of `configs/ablation_sae.py`.
      scores: of all its arms and seeds, by key.
      network: of the distances.
    """
    names = titles(network)
    columns = {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "distance": f"cosine distance{names['frechet'].removeprefix('FD')}",
        **names,
        "neighbours": "class by 5 neighbours (%)",
        "linear": "class by linear probe (%)",
    }
    own = {name: [scores[name]] for name in ("photographs", "teacher")}
    arms = {arm: [scores[key_of(arm, seed)] for seed in config.seeds] for arm in config.order}
    about = (
        f"{config.images} held-out images, classes learned from {config.known} training images; "
        f"{config.base.steps} steps of {config.base.batch_size}; mean ± deviation of "
        f"{len(config.seeds)} seed(s)."
    )
    first, second = _table("", columns, own | arms), _table("", EXCHANGED, arms)
    return "\n".join([about, "", *first, "", *second])


def flow_tables(
    config: ml_collections.ConfigDict, scores: dict[str, Score], network: features.FeatureNetwork
) -> str:
    """Markdown tables of flows: arms, arms over training, samplers by steps, decode radii.

    Args:
      config: config of `configs/ablation_flow.py`.
      scores: of all its settings, by key.
      network: of the distances.
    """
    names = titles(network)

    def arms(guidance: float = 1.0, step: int = 0) -> dict[str, list[Score]]:
        of = functools.partial(flow_comparison.arm_setting, config, guidance=guidance, step=step)
        return {arm: [scores[of(arm, seed).key] for seed in config.seeds] for arm in config.order}

    def one(setting: flow_comparison.Setting) -> list[Score]:
        return [scores[setting.key]]

    own = {name: [scores[name]] for name in ("photographs", "reconstructions")}
    lines = [
        f"{config.samples} samples against {config.images} held-out photographs; "
        f"{config.base.steps} steps of {config.base.batch_size}; mean ± deviation of "
        f"{len(config.seeds)} seed(s)."
    ]
    for scale in config.guidances:
        note = "unguided" if scale == 1 else f"guidance {scale:g}"
        lines += ["", *_table(f"flow, {note}", names, arms(scale) | own)]
    over = flow_comparison.steps_of_training(config)
    grown = [arms(step=step) for step in over.values()]
    trained = {arm: [[run["kernel"] for run in at[arm]] for at in grown] for arm in config.order}
    head = [f"{names['kernel']} over training", *(f"step {step}" for step in over)]
    lines += ["", *_lines(head, trained)]
    if config.once:
        first = {
            arm: flow_comparison.arm_setting(config, arm, config.seeds[0])
            for arm in (config.sweep.arm, *config.once)
        }
        lines += ["", *_table("one seed", names, {arm: one(x) for arm, x in first.items()})]
    counts = tuple(config.sweep.steps)
    drawn = {
        sampler: [
            [run["kernel"] for run in one(flow_comparison.sampler_setting(config, sampler, n))]
            for n in counts
        ]
        for sampler in config.sweep.samplers
    }
    head = [f"sampler, {names['kernel']}", *(f"{n} steps" for n in counts)]
    lines += ["", *_lines(head, drawn)]
    radii = {f"x {x:g}": one(flow_comparison.radius_setting(config, x)) for x in config.sweep.radii}
    lines += ["", *_table("decode radius", names, radii)]
    if config.sweep.decoder:
        decoders = {"own": "", config.sweep.decoder: config.sweep.decoder}
        by = {n: one(flow_comparison.decoder_setting(config, x)) for n, x in decoders.items()}
        lines += ["", *_table("decoder", names, by)]
    return "\n".join(lines)


def write_pictures(
    config: ml_collections.ConfigDict,
    folder: epath.Path,
    scores: dict[str, Score],
    network: features.FeatureNetwork,
) -> None:
    """Writes ablation_flow.png: curves of training and of the sweeps, and samples of each arm.

    Args:
      config: config of the comparison.
      folder: where the arms are and the figure goes.
      scores: scores of all settings, by key.
      network: of the distances.
    """
    sweep, title = config.sweep, titles(network)["kernel"]
    counts, radii = tuple(sweep.steps), tuple(sweep.radii)
    steps = flow_comparison.steps_of_training(config)

    def kernel(settings: list[flow_comparison.Setting]) -> list[float]:
        return [scores[setting.key]["kernel"] for setting in settings]

    def trained(arm: str) -> list[list[float]]:
        setting = functools.partial(flow_comparison.arm_setting, config, arm, guidance=1.0)
        at = steps.values()
        return [kernel([setting(seed, step=step) for step in at]) for seed in config.seeds]

    def by_steps(sampler: str) -> list[float]:
        return kernel([flow_comparison.sampler_setting(config, sampler, n) for n in counts])

    by_radius = kernel([flow_comparison.radius_setting(config, radius) for radius in radii])
    panels = {
        f"{title} over training": {arm: (tuple(steps), trained(arm)) for arm in config.order},
        f"{title} over steps of the sampler": {
            sampler: (counts, [by_steps(sampler)]) for sampler in sweep.samplers
        },
        f"{title} over decode radius / measured": {sweep.arm: (radii, [by_radius])},
    }
    plot = png.decode_png(curves.sweeps_png(panels))
    drawn = (workdir_of(folder, arm, config.seeds[0]) / "samples.png" for arm in config.order)
    grids = [
        pictures.captioned(png.decode_png(path.read_bytes()), arm)
        for arm, path in zip(config.order, drawn, strict=True)
    ]
    png.write_png(
        folder / "ablation_flow.png", pictures.stack([plot, pictures.side_by_side(grids)], gap=12)
    )


def titles(network: features.FeatureNetwork) -> dict[str, str]:
    """Metric of pictures -> its name in tables and figures, which includes the feature space."""
    names = {metric: network.metrics[metric][0] for metric in ("frechet", "kernel")}
    return {
        **names,
        "kernel": f"{names['kernel']} x 1000",
        "class_of_image": "class of the picture (%)",
    }


def _table(corner: str, columns: dict[str, str], rows: dict[str, list[Score]]) -> list[str]:
    """Rows are one score or those of several seeds; '-' where a score lacks the metric."""
    scales = {name: 100 if "%" in column else 1 for name, column in columns.items()}
    values = {
        title: [[scales[name] * run[name] for run in runs if name in run] for name in columns]
        for title, runs in rows.items()
    }
    return _lines([corner, *columns.values()], values)


def _lines(head: list[str], rows: dict[str, list[list[float]]]) -> list[str]:
    """A Markdown table; a cell holds one value or those of several seeds."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {title} | {' | '.join(map(_cell, row))} |" for title, row in rows.items()]


def _cell(values: list[float]) -> str:
    """Mean ± deviation."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else "-"
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}"
