"""The comparison of flows: its arms, what is sampled, the drawn affine part, the tables.

The tiny variant runs in tests/test_tiny_variants.py.
"""

import collections
from typing import get_args

import numpy as np
import pytest

from configs import ablation_flow as ablation_config
from dinosae_jax import names, rules
from dinosae_jax.data import png
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import comparison
from dinosae_jax.jobs import ablation
from dinosae_jax.report import comparison_tables, curves
from dinosae_jax.runtime import stopping
from dinosae_jax.train import stages as stages_lib
from dinosae_jax.weights import weight_source


def test_arms_differ_in_their_path_alone():
    config = ablation_config.get_config()
    rules.validate(config)
    stages = [ablation.arm_config(config, arm, 1) for arm in config.order]
    assert {stage.flow.path for stage in stages} == set(get_args(names.FlowPath))
    for stage in stages:
        stage.flow.path = stage.name = ""
    assert all(stage == stages[0] for stage in stages)
    assert set(config.sweep.samplers) == set(get_args(names.Sampler))


def test_everything_is_sampled_once_with_every_seed():
    config = ablation_config.get_config()
    found = comparison.settings(config)
    # The arm of the sweeps by its own sampler, and at its own radius, stands in two tables.
    assert len(found) == len({setting.key for setting in found}) == 3 * (4 + 6 * 4 + 7 - 2)
    assert collections.Counter(setting.seed for setting in found) == {0: 33, 1: 33, 2: 33}
    radii = [setting.radius for setting in found]
    assert (min(radii), max(radii)) == (0.5, 2.0)
    assert {setting.steps for setting in found} == {5, 10, 25, 50}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sweep.arm", "raw, linear", r"sweep\.arm"),
        ("sweep.samplers", ("dpm2",), "did you mean 'dpm2m'"),
        ("sweep.steps", (10, 0), "at least 1 step"),
        ("sweep.radii", (1.0, 0.0), "decode_radius must be above zero"),
        ("kernel_subset_size", 41, "fewer of samples and reference, 40; got 41"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(field, value, message):
    config = ablation_config.get_config("tiny")
    rules.validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message) as error:
        rules.validate(config)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_autoencoder_starts_from_norms_that_differ(tmp_path, monkeypatch):
    ran = []
    run = lambda stage, workdir, _: ran.append((stage, workdir))  # noqa: E731
    monkeypatch.setattr(stages_lib, "run_stage", run)
    config = ablation_config.get_config("tiny")
    for _ in range(2):  # the second time it finds what the first one drew
        workdir = ablation.train_autoencoder(config, tmp_path, stopping.StopRequest())
    assert [str(place) for _, place in ran] == [workdir] * 2
    norm = weight_source.open_weights(ran[0][0].init_from).variables["vit"]["params"]["norm"]
    assert norm["scale"].std() > 0.3
    power = np.mean(norm["scale"] ** 2 + norm["bias"] ** 2)
    assert power == pytest.approx(1.0, rel=1e-5)  # tokens keep the norm sqrt(d) of unit variance


def test_tables_are_means_and_deviations_over_seeds():
    config = ablation_config.get_config()
    found = comparison.settings(config)
    scores = {each.key: {"frechet": 1.0 + each.seed, "kernel": 5.0} for each in found}
    scores |= {"real crops": {"frechet": 0.5, "kernel": 0.1}}
    scores |= {"reconstructed crops": {"frechet": 0.7, "kernel": 0.2}}
    names = comparison_tables.titles(features.efficientnet({}, ""))
    lines = comparison_tables.tables(config, scores, names)
    assert lines[0] == "| arm | FD EfficientNet-Lite0 | KID EfficientNet-Lite0 x 1000 |"
    assert "| raw, trigonometric | 2 ± 1 | 5 ± 0 |" in lines
    assert "| real crops | 0.5 | 0.1 |" in lines
    head = "| sampler, FD EfficientNet-Lite0 | 5 steps | 10 steps | 25 steps | 50 steps |"
    assert head in lines
    assert "| dpm2m | 2 ± 1 | 2 ± 1 | 2 ± 1 | 2 ± 1 |" in lines
    assert "| FD EfficientNet-Lite0 | 2 ± 1" in "\n".join(lines)


def test_scores_are_kept_and_those_of_another_comparison_refused(tmp_path):
    judged = []

    def judge(pixels):
        judged.append(pixels)
        return {"frechet": 1.0, "kernel": 2.0}

    path = tmp_path / "scores.json"
    for _ in range(2):
        scores = comparison.Scores(path, {"samples": 200}, judge)
        scores.add("an arm", lambda: np.zeros(3))
    assert len(judged) == 1
    assert set(scores.scores) == {"an arm"}
    with pytest.raises(
        ValueError, match=r"one comparison; got .* \(samples: 100 here, 200 there\)"
    ):
        comparison.Scores(path, {"samples": 100}, judge)


def test_more_seeds_are_the_same_comparison_and_more_steps_another():
    network = features.FeatureNetwork("net", "sha", "", {}, {}, lambda variables, x: {})
    config = ablation_config.get_config()
    recipe = comparison.recipe_of(config, network)
    config.seeds, config.sweep.steps = (0, 1, 2, 3), (100,)
    assert comparison.recipe_of(config, network) == recipe
    config.base.steps += 1
    assert comparison.recipe_of(config, network) != recipe


def test_scores_of_two_feature_spaces_are_not_mixed(tmp_path):
    path, config = tmp_path / "scores.json", ablation_config.get_config()
    empty = {"params": {}, "batch_stats": {}}
    first, second = features.efficientnet(empty, "0123"), features.inception(empty, "6726")
    judge = lambda pixels: {"frechet": 1.0, "kernel": 2.0}  # noqa: E731
    measured = comparison.Scores(path, comparison.recipe_of(config, first), judge)
    measured.add("real crops", lambda: np.zeros(3))
    config.weights.efficientnet = "moved"  # the same weights in another folder
    again = comparison.Scores(path, comparison.recipe_of(config, first), judge)
    assert set(again.scores) == {"real crops"}
    before = path.read_text()
    with pytest.raises(ValueError, match=r"inception_fid.*efficientnet_lite0"):
        comparison.Scores(path, comparison.recipe_of(config, second), judge)
    assert path.read_text() == before


def test_a_folder_without_weights_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "train_autoencoder", None)
    config = ablation_config.get_config("tiny")
    config.weights.efficientnet = str(tmp_path)
    with pytest.raises(ValueError, match="holds no converted weights"):
        ablation.run(config, tmp_path / "run")


def test_the_sweeps_are_drawn():
    panels = {"over steps": {"a": ((5, 10), [[2.0, 1.0], [3.0, 1.5]])}, "b": {"b": ((1,), [[2.0]])}}
    picture = png.decode_png(curves.sweeps_png(panels))
    assert picture.shape[1] > 1000
    assert 0 < (picture < 250).any(axis=-1).mean() < 0.2
