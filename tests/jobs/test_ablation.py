"""The comparison of arms: their changes, and the table of means and deviations."""

import json

import pytest

from configs import ablation_sae
from dinosae_jax.jobs import ablation


def test_arms_change_what_they_say():
    config = ablation_sae.get_config()
    losses = {arm: dict(ablation.arm_config(config, arm, 1).losses.items()) for arm in config.order}
    assert losses["cosine, conv stem"]["cosine"] == 0.5
    assert (losses["MSE, conv stem"]["cosine"], losses["MSE, conv stem"]["mse"]) == (0.0, 0.016)
    assert losses["no alignment, conv stem"]["cosine"] == 0.0
    patch = ablation.arm_config(config, "cosine, patch embedding", 2)
    assert (patch.model.stem.kind, "widths" in patch.model.stem) == ("patch", False)
    assert patch.seed == 2
    assert config.base.model.stem.kind == "conv"


def test_the_table_is_mean_and_deviation_of_the_last_evaluation(tmp_path):
    for arm, values in {"a": (1.0, 3.0), "b": (5.0, 5.0)}.items():
        for seed, value in enumerate(values):
            folder = tmp_path / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            rows = [
                {"step": 1, "train/loss": 9.0},
                {"step": 1, "eval/psnr": -value},
                {"step": 2, "eval/psnr": value},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = ablation.write_comparison(tmp_path, ("a", "b"), (0, 1), ("psnr",))
    assert "| a | 2 ± 1.4 |" in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["a"]["psnr"]["mean"] == 2.0
    assert results["a"]["psnr"]["deviation"] == pytest.approx(2.0**0.5)
    assert (tmp_path / "curves.png").stat().st_size > 1000
