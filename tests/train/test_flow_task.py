"""The flow's training job: what its workdir holds, how it resumes, what it refuses."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import hae_dit, rfm_ddt, rfm_dit
from dinosae_jax import rules
from dinosae_jax.data import loading
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import flow_evaluation, flow_task, optim, preparation, stages
from dinosae_jax.weights import checkpoint, weight_source
from tests.tiny import small_flow


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_workdir_of_a_finished_run(flow_workdir):
    assert json.loads((flow_workdir / "DONE").read_text())["step"] == 2
    frozen = {path.name.split("-")[0] for path in (flow_workdir / "frozen").iterdir()}
    assert frozen == {"stem", "vit", "decoder"}
    rows = lines(flow_workdir / "metrics.jsonl")
    # A zero-initialised network predicts nothing: the mean square angle is near (pi/2)^2.
    assert rows[0]["train/loss"] == pytest.approx(np.pi**2 / 4, rel=0.15)
    assert rows[-1]["eval/loss"] > 0 and np.isfinite(rows[-1]["eval/kid_encoder"])
    assert any(
        "randomly initialised" in n for n in json.loads((flow_workdir / "notes.json").read_text())
    )
    with Image.open(flow_workdir / "samples.png") as picture:
        assert picture.height == 10 * 128 + 9 * 4  # a row for each of ten classes
        # Behind the name the photograph, then the samples.
        assert picture.width > (1 + flow_evaluation.SHOWN_EACH) * (128 + 4)
    norms = json.loads((flow_workdir / "latents.json").read_text())
    source = weight_source.open_weights(flow_workdir)
    assert source.convention["decode_radius"] == norms["mean"]
    assert norms["mean"] == pytest.approx(8.0, rel=0.01)  # LayerNorm of 64 channels, fresh affine
    assert norms["deviation"] < 0.1
    assert source.flow["label_names"][0] == "astronaut"
    assert source.flow["shift"] == 6.0


def test_an_interrupted_run_ends_as_one_that_was_not(flow_workdir, tmp_path):
    stages.run_stage(small_flow(**{"steps": 1, "checkpoint.every": 1}), tmp_path)
    (tmp_path / "DONE").unlink()
    stages.run_stage(small_flow(**{"checkpoint.every": 1}), tmp_path)
    ours, theirs = (
        checkpoint.load_fields(folder / "checkpoints" / "2", ("params", "ema", "opt"))[0]
        for folder in (tmp_path, flow_workdir)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    ours, theirs = ((at / "metrics.jsonl").read_bytes() for at in (tmp_path, flow_workdir))
    assert ours == theirs


def test_another_autoencoder_or_decode_radius_is_refused(flow_workdir):
    source = weight_source.open_weights(flow_workdir)
    record = {
        "frozen": {"stem": ["a", "1"], "decoder": ["b", "2"]},
        "convention": source.convention,
    }
    preparation.check_frozen(record, record)
    flow_task.check_convention(record, record)
    with pytest.raises(ValueError, match="frozen networks throughout; got another decoder"):
        preparation.check_frozen(record, {**record, "frozen": {"decoder": ["c", "3"]}})
    other = {**record, "convention": {**source.convention, "decode_radius": 9.0}}
    with pytest.raises(ValueError, match="decode_radius 9"):
        flow_task.check_convention(record, other)


def test_a_flow_without_an_autoencoder_is_refused():
    config = small_flow(random_frozen_ok=("vit",))
    with pytest.raises(ValueError, match=r"frozen stem needs weights.*init_from"):
        flow_task.initial_variables(config, flow_task.step_spec(precision.resolve_config(config)))


def test_an_autoencoder_of_another_radius_is_refused(flow_workdir):
    config = small_flow(**{"init_from": str(flow_workdir), "flow.radius": 7.0})
    with pytest.raises(ValueError, match=r"radius 7\.0 != 8\.0"):
        flow_task.initial_variables(config, flow_task.step_spec(precision.resolve_config(config)))


def test_another_number_of_classes_is_refused():
    class Source:
        num_classes = 3

    with pytest.raises(ValueError, match=r"--config\.model\.dit\.num_classes=3"):
        flow_task.check_classes(small_flow(), Source())


@pytest.mark.parametrize("module", [rfm_dit, rfm_ddt, hae_dit])
@pytest.mark.parametrize("argument", [None, "s", "b", "l", "xl", "tiny"])
def test_configs_are_valid(module, argument):
    config = module.get_config(argument)
    rules.validate(config)
    stage = flow_task.step_spec(precision.resolve_config(config))
    assert stage.times.shift == (6.0 if argument == "tiny" else 8.0)
    assert stage.radius == pytest.approx(8.0 if argument == "tiny" else 32.0)


@pytest.mark.parametrize("module", [rfm_dit, rfm_ddt])
def test_the_recipe_of_rae(module):
    """The rate of RAE's schedule after 80 of 800 epochs is 1.905e-4."""
    config = module.get_config("rae")
    rules.validate(config)
    assert (config.ema, config.optimizer.clip_norm) == (0.9995, 1.0)
    numbers = optim.hyperparameters(config.optimizer, config.steps)
    rates = [optim.learning_rate(np.int32(1251 * epoch), numbers) for epoch in (0, 40, 80, 800)]
    np.testing.assert_allclose(rates, [2e-4, 2e-4, 1.905e-4, 2e-5], rtol=2e-4)


@pytest.mark.parametrize(("name", "value"), [("jacobi", "data"), ("radial_weight", 0.1)])
def test_weights_of_the_sphere_are_refused_on_euclidean_paths(name, value):
    rules.validate(small_flow(**{f"flow.{name}": value}))
    with pytest.raises(ValueError, match=f"flow.{name} weighs errors on the sphere"):
        rules.validate(small_flow(**{f"flow.{name}": value, "flow.path": "linear"}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trainable", ("dit", "decoder"), "trains the diffusion transformer"),
        ("random_frozen_ok", ("lpips",), "random_frozen_ok"),
        ("flow.path", "geodesics", "did you mean 'geodesic'"),
        ("flow.time.distribution", "lognormal", "did you mean 'logit-normal'"),
        ("flow.time.sigma", 0.0, "flow.time.sigma must be above zero"),
        ("flow.time.max_time", 1.5, "max_time"),
        ("flow.radial_weight", -0.1, "flow.radial_weight must not be negative"),
        ("flow.jacobi", "both", "flow.jacobi"),
        ("model.dit.input_size", 16, "input_size must be that of the encoder's latents, 4"),
        ("model.dit.in_channels", 32, "in_channels must be"),
        ("model.dit.class_dropout_prob", 1.0, "class_dropout_prob"),
        ("eval.samples", 1, "eval.samples must be at least 2"),
        ("sampling.steps", 0, "at least 1 step"),
        ("sampling.sampler", "euler", "sampler must be a known name; got 'euler'"),
        ("sampling.interval", (0.9, 0.1), "guidance interval"),
    ],
)
def test_rules_between_fields(field, value, message):
    config = small_flow()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message) as error:
        rules.validate(config)
    assert "\n" not in str(error.value)


def test_batches_hold_images_and_labels():
    config = small_flow()
    source = flow_task.images.open_images(config.data, "train")
    mesh = sharding.make_mesh()
    batch = next(loading.training_batches(source, config, mesh, ("image", "label"), 8))
    assert {name: value.shape for name, value in batch.items()} == {
        "image": (8, 64, 64, 3),
        "label": (8,),
    }
