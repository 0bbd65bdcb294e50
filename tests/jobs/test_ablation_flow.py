"""The comparison of flows: its arms, what is sampled, the tables, stored scores.

The tiny variant runs in tests/test_tiny_variants.py.
"""

import collections
from typing import get_args

import pytest

from configs import ablation_flow as ablation_config
from dinosae_jax import names, rules
from dinosae_jax.data import png
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import flow_comparison
from dinosae_jax.eval.protocols import scores as scores_lib
from dinosae_jax.jobs import ablation
from dinosae_jax.report import comparison_tables, curves
from dinosae_jax.train import stages as stages_lib


def test_arms_differ_in_their_path_alone():
    config = ablation_config.get_config()
    rules.validate(config)
    stages = [ablation.arm_config(config, arm, 1) for arm in config.order]
    assert {stage.flow.path for stage in stages} == set(get_args(names.FlowPath))
    for stage in stages:
        stage.flow.path = stage.name = ""
    assert all(stage == stages[0] for stage in stages)
    assert set(config.sweep.samplers) == set(get_args(names.Sampler))


def test_what_is_trained_once_changes_one_thing_of_the_swept_arm():
    config = ablation_config.get_config()
    assert ablation.arm_config(config, config.sweep.arm, 0).flow.path == "geodesic"
    for arm in config.once:
        stage = ablation.arm_config(config, arm, 0)
        ((field, value),) = ablation_config.ONCE[arm].items()
        base = ablation.arm_config(config, config.sweep.arm, 0)
        *parents, last = field.split("/")
        node, usual = stage, base
        for parent in parents:
            node, usual = node[parent], usual[parent]
        assert node[last] == value != usual[last]
        node[last], stage.name = usual[last], base.name
        assert stage == base


def test_everything_is_sampled_once():
    config = ablation_config.get_config()
    config.sweep.decoder = "runs/stage3"
    found = flow_comparison.settings(config)
    # 4 arms and 3 seeds, guided, not, and at 3 earlier steps; the swept arm by its own sampler at
    # 25 steps and at its own radius are among them.
    assert len(found) == len({each.key for each in found}) == 12 * 5 + 6 + (24 - 1) + (7 - 1) + 1
    assert collections.Counter(each.seed for each in found) == {0: 56, 1: 20, 2: 20}
    assert list(flow_comparison.steps_of_training(config).values()) == [500, 1000, 1500, 0]
    assert {each.step for each in found} == {0, 500, 1000, 1500}
    radii = [each.radius for each in found]
    assert (min(radii), max(radii)) == (0.5, 2.0)
    assert [each.decoder for each in found if each.decoder] == ["runs/stage3"]


def test_the_first_seed_alone_trains_what_is_trained_once(tmp_path, monkeypatch):
    ran = []
    run = lambda stage, workdir, _: ran.append(str(workdir.relative_to(tmp_path)))  # noqa: E731
    monkeypatch.setattr(stages_lib, "run_stage", run)
    monkeypatch.setattr(ablation, "compare_flows", lambda *_: None)
    config = ablation_config.get_config("tiny")
    config.seeds = (3, 5)
    ablation.run(config, ablation.epath.Path(tmp_path))
    arm = "projected, geodesic"
    assert ran == [f"{arm}/seed3", "shift 3/seed3", f"{arm}/seed5"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sweep.arm", "raw, linear", r"sweep\.arm"),
        ("sweep.samplers", ("dpm2",), "did you mean 'dpm2m'"),
        ("sweep.steps", (10, 0), "at least 1 step"),
        ("sweep.radii", (1.0, 0.0), "decode_radius must be above zero"),
        ("kernel_subset_size", 21, "fewer of samples and images, 20; got 21"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(field, value, message):
    config = ablation_config.get_config("tiny")
    rules.validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message) as error:
        rules.validate(config)
    assert "\n" not in str(error.value)


def test_tables_are_means_and_deviations_over_seeds():
    config = ablation_config.get_config()
    config.sweep.decoder = "runs/stage3"
    found = flow_comparison.settings(config)
    scores = {
        each.key: {"frechet": 1.0 + each.seed, "kernel": 5.0, "class_of_image": 0.25}
        for each in found
    }
    scores |= {"photographs": {"frechet": 0.5, "kernel": 0.1, "class_of_image": 0.9}}
    scores |= {"reconstructions": {"frechet": 0.7, "kernel": 0.2, "class_of_image": 0.8}}
    config.base.steps = 2000
    lines = comparison_tables.flow_tables(config, scores, features.efficientnet({}, "")).split("\n")
    names = "FD EfficientNet-Lite0 | KID EfficientNet-Lite0 x 1000 | class of the picture (%)"
    assert f"| flow, unguided | {names} |" in lines
    assert lines.count("| raw, trigonometric | 2 ± 1 | 5 ± 0 | 25 ± 0 |") == 2  # and guided
    assert "| photographs | 0.5 | 0.1 | 90 |" in lines
    head = "KID EfficientNet-Lite0 x 1000 over training | step 500 | step 1000 | step 1500 | step"
    assert f"| {head} 2000 |" in lines
    assert "| raw, linear | 5 ± 0 | 5 ± 0 | 5 ± 0 | 5 ± 0 |" in lines
    assert "| dpm2m | 5 | 5 | 5 | 5 |" in lines
    assert "| shift 3 | 1 | 5 | 25 |" in lines
    assert "| x 0.5 | 1 | 5 | 25 |" in lines
    assert "| runs/stage3 | 1 | 5 | 25 |" in lines


def test_scores_are_kept_and_those_of_another_comparison_refused(tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return {"frechet": 1.0, "kernel": 2.0}

    path = tmp_path / "scores.json"
    for _ in range(2):
        scores = scores_lib.Scores(path, {"samples": 200})
        scores.add("an arm", measure)
    assert len(measured) == 1
    assert set(scores.scores) == {"an arm"}
    with pytest.raises(
        ValueError, match=r"one comparison; got .* \(samples: 100 here, 200 there\)"
    ):
        scores_lib.Scores(path, {"samples": 100})


def test_more_seeds_are_the_same_comparison_and_more_steps_another():
    network = features.FeatureNetwork("net", "sha", "", {}, {}, lambda variables, x: {})
    config = ablation_config.get_config()
    recipe = scores_lib.recipe_of(config, network)
    config.seeds, config.sweep.steps = (0, 1, 2, 3), (100,)
    assert scores_lib.recipe_of(config, network) == recipe
    config.base.steps += 1
    assert scores_lib.recipe_of(config, network) != recipe


def test_scores_of_two_feature_spaces_are_not_mixed(tmp_path):
    path, config = tmp_path / "scores.json", ablation_config.get_config()
    empty = {"params": {}, "batch_stats": {}}
    first, second = features.efficientnet(empty, "0123"), features.inception(empty, "6726")
    measured = scores_lib.Scores(path, scores_lib.recipe_of(config, first))
    measured.add("photographs", lambda: {"frechet": 1.0, "kernel": 2.0})
    config.weights.efficientnet = "moved"  # the same weights in another folder
    again = scores_lib.Scores(path, scores_lib.recipe_of(config, first))
    assert set(again.scores) == {"photographs"}
    before = path.read_text()
    with pytest.raises(ValueError, match=r"inception_fid.*efficientnet_lite0"):
        scores_lib.Scores(path, scores_lib.recipe_of(config, second))
    assert path.read_text() == before


def test_a_folder_without_weights_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_lib, "run_stage", None)
    config = ablation_config.get_config("tiny")
    config.weights.efficientnet = str(tmp_path)
    with pytest.raises(ValueError, match="holds no converted weights"):
        ablation.run(config, tmp_path / "run")


def test_the_sweeps_are_drawn():
    panels = {"over steps": {"a": ((5, 10), [[2.0, 1.0], [3.0, 1.5]])}, "b": {"b": ((1,), [[2.0]])}}
    picture = png.decode_png(curves.sweeps_png(panels))
    assert picture.shape[1] > 1000
    assert 0 < (picture < 250).any(axis=-1).mean() < 0.2
