"""The papers' results: the run that makes each, the command that measures it, and the runs' costs.

    python -m dinosae_jax.main --config=configs/paper.py --workdir=runs/paper

Writes paper.md, the two tables of docs/reproduce.md. Nothing is run: hours are the model FLOPs of a
run divided by `utilisation` of the peak of one accelerator.
"""

from __future__ import annotations

import ml_collections

from configs import (
    hae_dit,
    hae_stage1,
    hae_stage2,
    rfm_ddt,
    rfm_dit,
    sae_stage1,
    sae_stage2,
    sae_stage3,
    sae_stage4,
)
from dinosae_jax import config as config_lib

NO_NOISE = {"latent_noise.tau": 0.0, "latent_noise.tau_end": 0.0, "latent_noise.ramp_steps": 0}
SHORT = {"steps": config_lib.epochs(20, 1024), "flow.radial_weight": 0.0}
# Name of the run, which is also its folder in runs/ -> config, the run before it, what differs.
RUNS = {
    "sae_stage1": (sae_stage1, "", {}),
    "sae_stage2": (sae_stage2, "sae_stage1", {}),
    "sae_stage3": (sae_stage3, "sae_stage2", {}),
    "sae_stage4": (sae_stage4, "sae_stage3", {}),
    "rfm_dit": (rfm_dit, "sae_stage4", {}),
    "rfm_ddt": (rfm_ddt, "sae_stage4", {}),
    "hae_stage1": (hae_stage1, "", {}),
    "hae_stage2": (hae_stage2, "hae_stage1", {}),
    "hae_stage2_no_noise": (hae_stage2, "hae_stage1", NO_NOISE),
    "hae_dit": (hae_dit, "hae_stage2", {}),
    "hae_dit_550": (hae_dit, "hae_stage2", {"steps": config_lib.epochs(550, 1024)}),
    "hae_dit_no_noise": (hae_dit, "hae_stage2_no_noise", {}),
    "hae_dit_linear": (
        hae_dit,
        "hae_stage2",
        {"flow.path": "linear", "flow.radial_weight": 0.0},
    ),
    "hae_dit_radial_0": (hae_dit, "hae_stage2", SHORT),
}
INCEPTION = {"weights.inception": "weights/inception"}
SAMPLES = {**INCEPTION, "reference": "downloads/VIRTUAL_imagenet256_labeled.npz"}
EXACT = {**SAMPLES, "dtype": "float32"}  # the second version calls bfloat16 unstable
GUIDED = {**EXACT, "sample.sampling.guidance": 1.1}
RADIUS = {**EXACT, "sample.sampling.decode_radius": 8.0}
# Version of the paper, number, its value, the run that makes it, and what measures it: the folder's
# name after that of the run, the config file and its fields.
NUMBERS = (
    ("1", "rFID, PSNR", "0.37, 26.2 dB", "sae_stage3", "", "evaluate", INCEPTION),
    (
        "1",
        "LightningDiT-XL: gFID, IS, precision, recall",
        "3.47 (3.80 in the text), 202.1, 0.82, 0.55",
        "rfm_dit",
        "",
        "evaluate",
        SAMPLES,
    ),
    (
        "1",
        "DiT^DH-XL: gFID, IS, precision, recall",
        "3.07 (2.66 in the authors' README), 209.7, 0.80, 0.63",
        "rfm_ddt",
        "",
        "evaluate",
        SAMPLES,
    ),
    (
        "1",
        "linear probe, top-1 and top-5",
        "teacher 89, 98; student 87, 97",
        "sae_stage3",
        "probe",
        "probe",
        {},
    ),
    ("1", "PCA of teacher and student (Figure 4)", "a picture", "sae_stage3", "pca", "pca", {}),
    ("2", "rFID, PSNR", "0.78, 25.2 dB", "hae_stage2", "", "evaluate", INCEPTION),
    (
        "2",
        "rFID, PSNR without latent noise",
        "0.37, 26.2 dB",
        "hae_stage2_no_noise",
        "",
        "evaluate",
        INCEPTION,
    ),
    ("2", "gFID, 80 epochs", "2.65", "hae_dit", "", "evaluate", EXACT),
    ("2", "gFID, 550 epochs", "1.96", "hae_dit_550", "", "evaluate", EXACT),
    (
        "2",
        "gFID, 550 epochs, guidance 1.1",
        "1.90",
        "hae_dit_550",
        "guided",
        "evaluate",
        GUIDED,
    ),
    (
        "2",
        "gFID, decoder without latent noise",
        "32.64",
        "hae_dit_no_noise",
        "",
        "evaluate",
        EXACT,
    ),
    ("2", "gFID, Euclidean flow", "15.95", "hae_dit_linear", "", "evaluate", EXACT),
    (
        "2",
        "gFID, 20 epochs, radial weight 0 (0.1; 1)",
        "4.40 (3.90; 5.70)",
        "hae_dit_radial_0",
        "",
        "evaluate",
        EXACT,
    ),
    (
        "2",
        "gFID decoded at radius 8 (14; 18)",
        "7.36 (2.65; worse)",
        "hae_dit",
        "radius_8",
        "evaluate",
        RADIUS,
    ),
)


def get_config(argument=None):
    """Every run and every number; the variant tiny changes nothing."""
    stages, commands = {}, {}
    for name, (module, start, changes) in RUNS.items():
        stage = module.get_config()
        stage.update_from_flattened_dict(changes)
        stage.name, stage.init_from = name, f"runs/{start}" if start else ""
        before = _frozen(stages[start]) if start else {}  # init_from brings these along
        needed = {role: path for role, path in _frozen(stage).items() if role not in before}
        weights = {f"weights.{role}": path for role, path in needed.items()}
        fields = {"init_from": stage.init_from, **weights, **changes}
        commands[name] = _command(module.__name__.split(".")[-1], name, fields)
        stages[name] = stage
    numbers = []
    for version, number, value, run, suffix, file, fields in NUMBERS:
        folder = "_".join(filter(None, ("measure", run, suffix)))
        command = _command(file, folder, {"init_from": f"runs/{run}", **fields})
        numbers.append((version, number, value, run, command))
    config = ml_collections.ConfigDict(
        dict(
            job="paper",
            name="paper",
            chain=tuple(RUNS),
            stages=stages,
            commands=commands,
            numbers=tuple(numbers),
            utilisation=0.4,
            accelerators={  # in the table -> as jax calls it
                "A100": "NVIDIA A100-SXM4-80GB",
                "H100": "NVIDIA H100 80GB HBM3",
                "TPU v5p": "TPU v5p",
                "TPU v6e": "TPU v6 lite",
            },
            compile_cache="auto",
        )
    )
    return config_lib.apply_variants(config, argument, {"tiny": {}})


def _command(file, folder, fields):
    """The whole line that runs configs/FILE.py into runs/FOLDER; empty fields are left out."""
    given = [f"--config.{field}={value}" for field, value in fields.items() if value != ""]
    entry = f"python -m dinosae_jax.main --config=configs/{file}.py --workdir=runs/{folder}"
    return " ".join([entry, *given])


def _frozen(stage):
    """The published networks that a stage uses frozen: role -> folder of the converted weights."""
    losses = stage.get("losses", {})
    wanted = {
        "vit": bool(losses),
        "lpips": losses.get("lpips"),
        "dino": losses.get("gan"),
    }
    folders = {"vit": "weights/dinov3", "lpips": "weights/lpips", "dino": "weights/dino"}
    return {role: folder for role, folder in folders.items() if wanted[role]}
