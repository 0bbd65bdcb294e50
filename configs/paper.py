"""The papers' results: the run that makes each, the command that measures it, and the runs' costs.

    python -m dinosae_jax.main --config=configs/paper.py

Writes paper.md, the two tables of the README. Nothing is run: hours are the model FLOPs of a run
divided by `utilisation` of the peak of one accelerator.
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
from dinosae_jax import names

NO_NOISE = {"latent_noise.tau": 0.0, "latent_noise.tau_end": 0.0, "latent_noise.ramp_steps": 0}
SHORT = {"steps": config_lib.epochs(20, 1024), "flow.radial_weight": 0.0}
# Name of the run -> config, the run that it starts from, what differs. A run that bears the name of
# its config goes to the folder of that config and starts where that config starts.
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
    "hae_dit_linear": (hae_dit, "hae_stage2", {"flow.path": "linear", "flow.radial_weight": 0.0}),
    "hae_dit_radial": (hae_dit, "hae_stage2", SHORT),
}
RECONSTRUCTIONS = "evaluate.py"
SAMPLES = "evaluate.py --config.reference=$REFERENCE"
EXACT = f"{SAMPLES} --config.dtype=float32"  # the second version calls bfloat16 unstable
GUIDED = f"{EXACT} --config.sample.sampling.guidance=1.1"
RADIUS = f"{EXACT} --config.sample.sampling.decode_radius=8"
# Version of the paper, number, its value, the run that makes it, what measures it.
NUMBERS = (
    ("1", "rFID, PSNR", "0.37, 26.2 dB", "sae_stage3", RECONSTRUCTIONS),
    (
        "1",
        "LightningDiT-XL: gFID, IS, precision, recall",
        "3.47 (3.80 in the text), 202.1, 0.82, 0.55",
        "rfm_dit",
        SAMPLES,
    ),
    (
        "1",
        "DiT^DH-XL: gFID, IS, precision, recall",
        "3.07 (2.66 in the authors' README), 209.7, 0.80, 0.63",
        "rfm_ddt",
        SAMPLES,
    ),
    (
        "1",
        "linear probe, top-1 and top-5",
        "teacher 89, 98; student 87, 97",
        "sae_stage3",
        "probe.py",
    ),
    ("1", "PCA of teacher and student (Figure 4)", "a picture", "sae_stage3", "pca.py"),
    ("2", "rFID, PSNR", "0.78, 25.2 dB", "hae_stage2", RECONSTRUCTIONS),
    ("2", "without latent noise", "0.37, 26.2 dB", "hae_stage2_no_noise", RECONSTRUCTIONS),
    ("2", "gFID, 80 epochs", "2.65", "hae_dit", EXACT),
    ("2", "gFID, 550 epochs", "1.96", "hae_dit_550", EXACT),
    ("2", "gFID, 550 epochs, guidance 1.1", "1.90", "hae_dit_550", GUIDED),
    ("2", "gFID, decoder without latent noise", "32.64", "hae_dit_no_noise", EXACT),
    ("2", "gFID, Euclidean flow", "15.95", "hae_dit_linear", EXACT),
    (
        "2",
        "gFID, 20 epochs, radial weight 0 (0.1; 1)",
        "4.40 (3.90; 5.70)",
        "hae_dit_radial",
        EXACT,
    ),
    ("2", "gFID decoded at radius 8 (14; 18)", "7.36 (2.65; worse)", "hae_dit", RADIUS),
)


def get_config(argument=None):
    """Every run and every number; the variant tiny changes nothing."""
    stages, commands = {}, {}
    for name, (module, start, changes) in RUNS.items():
        stage = module.get_config()
        own_start = stage.init_from
        stage.update_from_flattened_dict(changes)
        stage.name, stage.init_from = name, f"runs/{start}" if start else ""
        found = config_lib.frozen_networks(stages[start]) if start else ()
        needed = [role for role in config_lib.frozen_networks(stage) if role not in found]
        flags = {f"weights.{role}": names.CONVERSIONS[role].folder for role in needed}
        if stage.init_from != own_start:
            flags["init_from"] = stage.init_from
        config_name = module.__name__.split(".")[-1]
        place = [f"--workdir=runs/{name}"] if name != config_name else []
        given = [f"--config.{field}={value}" for field, value in (flags | changes).items()]
        commands[name] = " ".join((f"{config_name}.py", *place, *given))
        stages[name] = stage
    config = ml_collections.ConfigDict(
        dict(
            job="paper",
            name="paper",
            chain=tuple(RUNS),
            stages=stages,
            commands=commands,
            numbers=NUMBERS,
            utilisation=0.4,
            accelerators={  # in the table -> as jax calls it
                "A100": "NVIDIA A100-SXM4-80GB",
                "H100": "NVIDIA H100 80GB HBM3",
                "TPU v5p": "TPU v5p",
                "TPU v6e": "TPU v6 lite",
            },
            compile_cache="",
        )
    )
    return config_lib.apply_variants(config, argument, {"tiny": {}})
