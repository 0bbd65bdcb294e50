"""The papers' numbers: which run makes each, which command measures it, and what the runs cost.

    python -m dinosae_jax.main --config=configs/paper.py --workdir=runs/paper

Writes paper.md, the two tables of the README. Nothing is run: hours are the model FLOPs of a run
divided by `utilisation` of the peak of one accelerator.
"""

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
# Name of the workdir -> config, the run that it starts from, what differs.
RUNS = {
    "stage1": (sae_stage1, "", {}),
    "stage2": (sae_stage2, "stage1", {}),
    "stage3": (sae_stage3, "stage2", {}),
    "stage4": (sae_stage4, "stage3", {}),
    "flow": (rfm_dit, "stage4", {}),
    "flow_ddt": (rfm_ddt, "stage4", {}),
    "hae1": (hae_stage1, "", {}),
    "hae2": (hae_stage2, "hae1", {}),
    "hae2_no_noise": (hae_stage2, "hae1", NO_NOISE),
    "hae_flow": (hae_dit, "hae2", {}),
    "hae_flow_550": (hae_dit, "hae2", {"steps": config_lib.epochs(550, 1024)}),
    "hae_flow_no_noise": (hae_dit, "hae2_no_noise", {}),
    "hae_flow_linear": (hae_dit, "hae2", {"flow.path": "linear", "flow.radial_weight": 0.0}),
    "hae_radial": (hae_dit, "hae2", SHORT),
}
RECONSTRUCTIONS = "evaluate.py"
SAMPLES = "evaluate.py --config.reference=$REFERENCE"
EXACT = f"{SAMPLES} --config.dtype=float32"  # the second version calls bfloat16 unstable
GUIDED = f"{EXACT} --config.sample.sampling.guidance=1.1"
RADIUS = f"{EXACT} --config.sample.sampling.decode_radius=8"
# Version of the paper, number, its value, the run that makes it, what measures it.
NUMBERS = (
    ("1", "rFID, PSNR", "0.37, 26.2 dB", "stage3", RECONSTRUCTIONS),
    (
        "1",
        "LightningDiT-XL: gFID, IS, precision, recall",
        "3.47 (3.80 in the text), 202.1, 0.82, 0.55",
        "flow",
        SAMPLES,
    ),
    (
        "1",
        "DiT^DH-XL: gFID, IS, precision, recall",
        "3.07 (2.66 in the authors' README), 209.7, 0.80, 0.63",
        "flow_ddt",
        SAMPLES,
    ),
    (
        "1",
        "linear probe, top-1 and top-5",
        "teacher 89, 98; student 87, 97",
        "stage3",
        "probe.py",
    ),
    ("1", "PCA of teacher and student (Figure 4)", "a picture", "stage3", "pca.py"),
    ("2", "rFID, PSNR", "0.78, 25.2 dB", "hae2", RECONSTRUCTIONS),
    ("2", "without latent noise", "0.37, 26.2 dB", "hae2_no_noise", RECONSTRUCTIONS),
    ("2", "gFID, 80 epochs", "2.65", "hae_flow", EXACT),
    ("2", "gFID, 550 epochs", "1.96", "hae_flow_550", EXACT),
    ("2", "gFID, 550 epochs, guidance 1.1", "1.90", "hae_flow_550", GUIDED),
    ("2", "gFID, decoder without latent noise", "32.64", "hae_flow_no_noise", EXACT),
    ("2", "gFID, Euclidean flow", "15.95", "hae_flow_linear", EXACT),
    ("2", "gFID, 20 epochs, radial weight 0 (0.1; 1)", "4.40 (3.90; 5.70)", "hae_radial", EXACT),
    ("2", "gFID decoded at radius 8 (14; 18)", "7.36 (2.65; worse)", "hae_flow", RADIUS),
)


def get_config(argument=None):
    """Every run and every number; the variant tiny changes nothing."""
    stages, commands = {}, {}
    for name, (module, start, changes) in RUNS.items():
        stage = module.get_config()
        stage.update_from_flattened_dict(changes)
        stage.name, stage.init_from = name, f"runs/{start}" if start else ""
        flags = {"init_from": stage.init_from, **_weights(stage), **changes}
        given = [f"--config.{field}={value}" for field, value in flags.items() if value != ""]
        commands[name] = " ".join([f"{module.__name__.split('.')[-1]}.py", *given])
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


def _weights(stage):
    """The converted weights that a stage's command names."""
    losses = stage.get("losses", {})
    wanted = {
        "vit": losses and not stage.init_from,
        "lpips": losses.get("lpips"),
        "dino": losses.get("gan"),
    }
    folders = {"vit": "dinov3", "lpips": "lpips", "dino": "dino"}
    return {f"weights.{role}": f"weights/{folders[role]}" for role in wanted if wanted[role]}
