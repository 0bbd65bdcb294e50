"""The probe job: teacher and student, what it finds, what it refuses."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from configs import probe as config_file
from dinosae_jax import rules
from dinosae_jax.data import crops
from dinosae_jax.eval.protocols import inputs
from dinosae_jax.jobs import probe


def test_both_networks_tell_dark_from_bright(make_measurement, tmp_path):
    config = make_measurement(config_file, steps=40)
    rules.validate(config)
    probe.run(config, tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    rows = {row["metric"]: row for row in saved["results"]}
    assert list(rows) == ["top-1 teacher", "top-5 teacher", "top-1 student", "top-5 student"]
    for name in ("teacher", "student"):
        assert rows[f"top-1 {name}"]["value"] == 100.0
        assert rows[f"top-5 {name}"]["value"] == 100.0  # of two classes
        assert rows[f"top-1 {name}"]["count"] == 14
        assert len(rows[f"top-1 {name}"]["recipe"]["top1_of_each_rate"]) == 13
    assert "randomly initialised" in saved["notes"][0]
    assert "top-1 student" in (tmp_path / "results.md").read_text()


def test_bad_input_is_one_clear_line(make_measurement, tmp_path, squares):
    with pytest.raises(ValueError, match="multiple of the number of devices; got 12"):
        probe.run(make_measurement(config_file, batch_size=12), tmp_path)
    with pytest.raises(ValueError, match="at least 1 step; got steps=0"):
        probe.run(make_measurement(config_file, steps=0), tmp_path)
    one = make_measurement(config_file, data__source=f"folder:{squares / 'train' / 'dark'}")
    with pytest.raises(ValueError, match=r"data\.holdout"):
        probe.run(one, tmp_path)
    without = make_measurement(config_file)
    source = inputs.open_weights(without)
    autoencoder = inputs.open_autoencoder(without, source)
    del autoencoder.variables["vit"]["params"]["patch_embed"]
    with pytest.raises(ValueError, match="official DINO-SAE file leaves it out"):
        inputs.require_teacher(autoencoder)


def test_a_flat_validation_folder_has_no_labels_to_measure(make_measurement, squares, tmp_path):
    shutil.copytree(squares / "train", tmp_path / "data" / "train")
    shutil.copytree(squares / "val" / "dark", tmp_path / "data" / "val")
    config = make_measurement(config_file, data__source=f"folder:{tmp_path / 'data'}")
    with pytest.raises(ValueError, match=r"labels are needed.* has no class folders") as caught:
        probe.run(config, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_one_clear_line(make_measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(
        probe,
        "_compiled_features",
        lambda modules, name: lambda v, x: jnp.full((len(x), 64), jnp.nan),
    )
    with pytest.raises(ValueError, match="a probe needs finite features") as caught:
        probe.run(make_measurement(config_file, steps=2), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (16, 200)])
def test_random_resized_crops(shape):
    ramp = np.zeros((*shape, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, shape[1], dtype=np.uint8)
    ramp[..., 1] = np.linspace(0, 255, shape[0], dtype=np.uint8)[:, None]
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(200):
        crop = crops.random_resized_crop(ramp, 24, rng).astype(int)
        assert crop.shape == (24, 24, 3)
        # The part's sides, read off the ramps between the centres of the outer pixels.
        across = (crop[12, -1, 0] - crop[12, 0, 0]) / 255 * shape[1] * 24 / 23
        down = (crop[-1, 12, 1] - crop[0, 12, 1]) / 255 * shape[0] * 24 / 23
        parts.append((across * down / (shape[0] * shape[1]), across / down))
    area, aspect = np.array(parts).T
    assert area.min() > 0.05 and area.max() < 1.05
    assert aspect.min() > 0.6 and aspect.max() < 1.65  # 3/4 to 4/3 up to levels and rounding
    assert area.max() - area.min() > 0.3 or shape == (16, 200)
