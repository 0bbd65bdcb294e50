"""The tables of a comparison of autoencoders or flows, and the figure of one of flows."""

from __future__ import annotations

import functools

import ml_collections
import numpy as np
from etils import epath

from dinosae_jax.data import png
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import autoencoder_comparison, flow_comparison
from dinosae_jax.eval.protocols.scores import Score
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
    arms = {
        arm: [scores[autoencoder_comparison.key_of(arm, seed)] for seed in config.seeds]
        for arm in config.order
    }
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
    steps = flow_comparison.earlier_steps(config)
    over = {f"step {step}": step for step in steps} | {f"step {config.base.steps}": 0}
    lines += ["", f"| {names['kernel']} over training | {' | '.join(over)} |"]
    lines.append("|---" * (len(over) + 1) + "|")
    for arm in config.order:
        runs = [[run["kernel"] for run in arms(step=step)[arm]] for step in over.values()]
        lines.append(f"| {arm} | {' | '.join(map(_cell, runs))} |")
    if config.once:
        first = {
            arm: flow_comparison.arm_setting(config, arm, config.seeds[0])
            for arm in (config.sweep.arm, *config.once)
        }
        lines += ["", *_table("one seed", names, {arm: one(x) for arm, x in first.items()})]
    counts = tuple(config.sweep.steps)
    lines += ["", f"| sampler, {names['kernel']} | {' | '.join(f'{n} steps' for n in counts)} |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for sampler in config.sweep.samplers:
        drawn = [one(flow_comparison.sampler_setting(config, sampler, n)) for n in counts]
        lines.append(f"| {sampler} | {' | '.join(_cell([x['kernel']]) for (x,) in drawn)} |")
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
    steps = (*flow_comparison.earlier_steps(config), config.base.steps)

    def kernel(settings: list[flow_comparison.Setting]) -> list[float]:
        return [scores[setting.key]["kernel"] for setting in settings]

    def trained(arm: str, seed: int) -> list[float]:
        at = [step if step < config.base.steps else 0 for step in steps]
        return kernel([flow_comparison.arm_setting(config, arm, seed, 1.0, step) for step in at])

    def by_steps(sampler: str) -> list[float]:
        return kernel([flow_comparison.sampler_setting(config, sampler, n) for n in counts])

    by_radius = kernel([flow_comparison.radius_setting(config, radius) for radius in radii])
    panels = {
        f"{title} over training": {
            arm: (steps, [trained(arm, seed) for seed in config.seeds]) for arm in config.order
        },
        f"{title} over steps of the sampler": {
            sampler: (counts, [by_steps(sampler)]) for sampler in sweep.samplers
        },
        f"{title} over decode radius / measured": {sweep.arm: (radii, [by_radius])},
    }
    plot = png.decode_png(curves.sweeps_png(panels))
    drawn = (folder / arm / f"seed{config.seeds[0]}" / "samples.png" for arm in config.order)
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
    lines = [f"| {corner} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for title, runs in rows.items():
        scales = {name: 100 if "%" in column else 1 for name, column in columns.items()}
        values = [[scales[name] * run[name] for run in runs if name in run] for name in columns]
        lines.append(f"| {title} | {' | '.join(map(_cell, values))} |")
    return lines


def _cell(values: list[float]) -> str:
    """Mean ± deviation."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else "-"
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}"
