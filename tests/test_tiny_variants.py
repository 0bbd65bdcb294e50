"""Every config's `tiny` variant runs: training for a few steps, the rest by its command."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from dinosae_jax import rules
from tests.xla_flags import FAST_TO_COMPILE

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# Stages that continue another one: config -> the config whose workdir it starts from.
STARTS_FROM = {
    "sae_stage2": "sae_stage1",
    "sae_stage3": "sae_stage2",
    "sae_stage4": "sae_stage3",
    "hae_stage2": "hae_stage1",
}
# Programs that other tests compile in part: run in .ci/run only.
SLOW = (
    "ablation_flow",
    "ablation_sae",
    "hae_dit",
    "hae_stage1",
    "hae_stage2",
    "imagenette",
    "rae_decoder",
    "rae_dit",
    "rfm_ddt",
    "rfm_dit",
    "sae_stage1",
    "sae_stage2",
    "sae_stage3",
    "sae_stage4",
)
FEW_STEPS = {"steps": 2, "batch_size": 8, "eval.images": 8, "data.data_dir": ""}


def tiny_configs(trains):
    """Names of the configs that train, or of the others; each has a variant `tiny`."""
    for path in sorted(CONFIGS.glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "get_config"):
            job = module.get_config("tiny").job
            if (job in ("train", "ablation")) == trains:
                yield path.stem


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Name -> workdir, after the run; a stage's predecessor is run first."""
    root = tmp_path_factory.mktemp("tiny")
    done = {}

    def shorten(config):
        if "checkpoint" in config:  # a training run
            config.update_from_flattened_dict({**FEW_STEPS, "data.data_dir": str(root / "tfds")})

    def go(name):
        if name in done:
            return done[name]
        config = importlib.import_module(f"configs.{name}").get_config("tiny")
        shorten(config)
        for stage in config.get("stages", {}).values():
            shorten(stage)
        if "base" in config:
            shorten(config.base)
        if name in STARTS_FROM:
            config.init_from = str(go(STARTS_FROM[name]))
        rules.validate(config)
        job = importlib.import_module(f"dinosae_jax.jobs.{config.job}")
        done[name] = root / name
        job.run(config, root / name)
        return done[name]

    return go


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in tiny_configs(trains=True)
        if name != "quickstart"  # test_examples runs it by its command
    ],
)
def test_tiny_variant_runs(name, run, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "tfds"))
    workdir = run(name)
    assert any(path.is_file() and path.stat().st_size for path in workdir.rglob("*"))
    if (workdir / "checkpoints").exists():
        assert (workdir / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_configs(trains=False))
def test_tiny_command_runs(name, tmp_path):
    command = [sys.executable, "-m", "dinosae_jax.main", f"--config=configs/{name}.py:tiny"]
    # A benchmark runs its programs too often for a compiler that does not optimise.
    changes = {"XLA_FLAGS": "" if name == "bench" else FAST_TO_COMPILE}
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "tfds"), **changes}
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=CONFIGS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(
        path.is_file() and path.stat().st_size for path in tmp_path.joinpath("run").rglob("*")
    )


def test_every_stage_of_the_papers_has_a_config():
    trained = {"sae_stage1", "sae_stage2", "sae_stage3", "sae_stage4", "rfm_dit", "rfm_ddt"}
    names = set(tiny_configs(trains=True))
    assert trained | {"hae_stage1", "hae_stage2", "hae_dit", "quickstart"} <= names
