"""The benchmark runs every part and its figures fit together; nothing here is timed."""

import json

import jax
import pytest
from PIL import Image

from configs import bench as bench_config
from dinosae_jax import rules
from dinosae_jax.jobs import bench
from dinosae_jax.perf import flow_speed, loader_speed
from dinosae_jax.runtime import hardware
from dinosae_jax.train import step_flops
from tests import tiny


@pytest.mark.parametrize("argument", [None, "large", "tiny"])
def test_configs_are_valid(argument):
    config = bench_config.get_config(argument)
    rules.validate(config)
    for name in config.chain:
        assert step_flops.train_flops(config.stages[name]) > 0


@pytest.mark.slow
def test_a_row_and_the_loader(tmp_path, capsys):
    config = bench_config.get_config("tiny")
    config.chain = ("sae_stage1",)
    config.batch_per_device.sae_stage1 = 1
    config.stages.sae_stage1.data.image_size = 32
    config.warmup = config.repeats = config.steps = 1
    config.overhead.stage.update_from_flattened_dict(tiny.TINIEST)
    config.overhead.stage.data.source = ""
    config.overhead.update(batch_per_device=1, repeats=1, steps=2, jpegs=2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(loader_speed.synthetic_jpeg())
    config.loader.data.source = f"folder:{tmp_path / 'images'}"
    config.loader.update(batch_size=4, batches=1, jpegs=2)
    config.latents.update(images=4, tokens=4, width=8, batch_size=2, batches=2)
    config.flow.stage = ""
    bench.run(config, tmp_path)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["machine"]["devices"] == jax.device_count()
    row = result["steps"]["sae_stage1"]
    assert row["batch_size"] == jax.device_count()
    assert row["images_per_second"] * row["ms_per_step"] == pytest.approx(1e3 * row["batch_size"])
    assert row["flops_per_image"] == step_flops.train_flops(config.stages.sae_stage1)
    speed = row["tflops_per_device"] * 1e12 * jax.device_count()
    assert speed == pytest.approx(row["flops_per_image"] * row["images_per_second"])
    assert row["peak_memory_bytes"] > 0
    overhead = result["overhead"]
    added = overhead["loop_step_seconds"] - overhead["step_seconds"] + overhead["ema_seconds"]
    added += overhead["checkpoint_seconds"] / config.overhead.stage.checkpoint.every
    assert overhead["overhead"] == pytest.approx(added / overhead["step_seconds"])
    assert set(result["loader"]) == set(loader_speed.LOADERS)
    assert set(result["metrics"]) == {"Frechet distance", "precision and recall"}
    assert all(seconds["cpu"] > 0 for seconds in result["metrics"].values())
    assert set(result["latents"]) == {"bfloat16", "int8"}
    assert all(row["gb_per_second_per_core"] > 0 for row in result["latents"].values())
    printed = capsys.readouterr().out
    assert "sae_stage1: " in printed
    assert "TFLOP/s per device" in printed


@pytest.mark.slow
def test_rates_of_encoding_and_sampling():
    config = bench_config.get_config("tiny")
    config.flow.update(batch_per_device=1, sampling_steps=1)
    rates = flow_speed.measure_flow(config)
    assert rates["batch_size"] == jax.device_count()
    assert min(rates.values()) > 0


def test_the_synthetic_jpeg_is_like_a_photograph(tmp_path):
    data = loader_speed.synthetic_jpeg()
    assert 40_000 < len(data) < 120_000  # ImageNet's average is 110 KB
    (tmp_path / "x.jpg").write_bytes(data)
    assert Image.open(tmp_path / "x.jpg").size == (500, 375)


def test_utilisation_of_a_known_device():
    class Device:
        device_kind = "TPU v6 lite"

    speed = hardware.utilisation(10**12, 918.0, [Device(), Device()])
    assert speed == {"tflops_per_device": 459.0, "mfu": 0.5}
    Device.device_kind = "cpu"
    assert set(hardware.utilisation(10**12, 1.0, [Device()])) == {"tflops_per_device"}
