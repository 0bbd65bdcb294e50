"""The comparison of flows: its arms, what is sampled, the drawn affine part, the tables.

The tiny variant runs in tests/test_tiny_variants.py.
"""

import collections

import numpy as np
import pytest

from configs import ablation_flow as ablation_config
from dinosae_jax import rules
from dinosae_jax.eval import curves, pictures
from dinosae_jax.jobs import ablation, ablation_flow, train
from dinosae_jax.train import initialise, stopping


def test_arms_differ_in_their_path_alone():
    config = ablation_config.get_config()
    rules.validate(config)
    stages = [ablation.arm_config(config, arm, 1) for arm in config.order]
    assert {stage.flow.path for stage in stages} == set(rules.PATHS)
    for stage in stages:
        stage.flow.path = stage.name = ""
    assert all(stage == stages[0] for stage in stages)
    assert set(config.sweep.samplers) == set(rules.SAMPLERS)


def test_everything_is_sampled_with_every_seed():
    config = ablation_config.get_config()
    found = list(ablation_flow.settings(config))
    assert len(found) == len({key for key, *_ in found}) == 3 * (4 + 6 * 4 + 7)
    assert collections.Counter(seed for _, _, seed, _ in found) == {0: 35, 1: 35, 2: 35}
    radii = [given["decode_radius"] for *_, given in found if "decode_radius" in given]
    assert (min(radii), max(radii)) == (0.5, 2.0)


def test_an_arm_of_the_sweeps_that_is_not_run_is_refused():
    config = ablation_config.get_config("tiny")
    config.sweep.arm = "raw, linear"
    with pytest.raises(ValueError, match=r"sweep\.arm"):
        rules.validate(config)


def test_the_autoencoder_starts_from_norms_that_differ(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(train, "run_stage", lambda stage, workdir, _: ran.append((stage, workdir)))
    config = ablation_config.get_config("tiny")
    for _ in range(2):  # the second time it finds what the first one drew
        workdir = ablation_flow.train_autoencoder(config, tmp_path, stopping.StopRequest())
    assert [str(place) for _, place in ran] == [workdir] * 2
    norm = initialise.open_source(ran[0][0].init_from).variables["vit"]["params"]["norm"]
    assert norm["scale"].std() > 0.3
    power = np.mean(norm["scale"] ** 2 + norm["bias"] ** 2)
    assert power == pytest.approx(1.0, rel=1e-5)  # tokens keep the norm sqrt(d) of unit variance


def test_tables_are_means_and_deviations_over_seeds():
    config = ablation_config.get_config()
    keys = [key for key, *_ in ablation_flow.settings(config)]
    scores = {key: {"frechet": 1.0 + int(key[-1]), "kernel": 5.0} for key in keys}
    scores |= {name: {"frechet": 0.5, "kernel": 0.1} for name in ("real crops",)}
    scores |= {name: {"frechet": 0.7, "kernel": 0.2} for name in ("reconstructed crops",)}
    lines = ablation_flow.tables(config, scores)
    assert "| raw, trigonometric | 2 ± 1 | 5 ± 0 |" in lines
    assert "| real crops | 0.5 | 0.1 |" in lines
    assert "| sampler | 5 steps | 10 steps | 25 steps | 50 steps |" in lines
    assert "| dpm2m | 2 ± 1 | 2 ± 1 | 2 ± 1 | 2 ± 1 |" in lines
    assert "| Frechet distance | 2 ± 1" in "\n".join(lines)


def test_scores_are_kept(tmp_path):
    judged = []

    def judge(pixels):
        judged.append(pixels)
        return {"frechet": 1.0, "kernel": 2.0}

    for _ in range(2):
        scores = ablation_flow.Scores(tmp_path / "scores.json", judge)
        scores.add("arm/x/0", lambda: np.zeros(3))
    assert len(judged) == 3  # real and reconstructed crops, and the one that was added
    assert set(scores.scores) == {"real crops", "reconstructed crops", "arm/x/0"}


def test_the_sweeps_are_drawn():
    panels = {"over steps": {"a": ((5, 10), [[2.0, 1.0], [3.0, 1.5]])}, "b": {"b": ((1,), [[2.0]])}}
    picture = pictures.decode_png(curves.sweeps_png(panels))
    assert picture.shape[1] > 1000
    assert 0 < (picture < 250).any(axis=-1).mean() < 0.2
