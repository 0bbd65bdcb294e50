"""The front door: config files from anywhere, default folders, mistakes answered in one line."""

import importlib
import importlib.metadata
import os
import pathlib
import runpy
import subprocess
import sys
import tomllib

import pytest

import dinosae_jax
from dinosae_jax import config_files, main
from dinosae_jax.runtime import lease
from tests.xla_flags import flags

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_command(*arguments, cwd=ROOT, **environment):
    """The finished process of `python -m dinosae_jax.main` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "dinosae_jax.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags(1), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refusal(*arguments, **kwargs):
    """The one line with which a command is refused."""
    done = run_command(*arguments, **kwargs)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_the_package_says_its_version_and_that_it_is_typed():
    assert dinosae_jax.__version__ == importlib.metadata.version("dinosae-jax")
    assert dinosae_jax.__version__ == PROJECT["version"]
    assert (ROOT / "dinosae_jax" / "py.typed").is_file()


def test_the_console_script_is_the_entry_point():
    module, name = PROJECT["scripts"]["dinosae"].split(":")
    assert getattr(importlib.import_module(module), name) is main.run


def test_the_wheel_holds_every_folder_and_the_configs(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {path.parent for path in (ROOT / "dinosae_jax").rglob("*.py")}
    wanted = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert wanted <= set(given["packages"])
    (config_package,) = given["package_dir"]
    assert config_package in given["packages"]
    assert (ROOT / given["package_dir"][config_package] / "quickstart.py").is_file()
    relative = pathlib.Path(*config_package.split(".")[1:])
    assert relative == pathlib.Path("share") / config_files.PACKAGE


@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("configs/rfm_dit.py", "runs/rfm_dit"),
        ("configs/rfm_dit.py:tiny", "runs/rfm_dit_tiny"),
        ("/some/where/configs/encode.py:int8,tiny", "runs/encode_int8_tiny"),
    ],
)
def test_a_run_has_a_folder_by_default(value, folder):
    assert config_files.default_workdir(value) == folder
    name = pathlib.Path(value.partition(":")[0]).stem
    assert config_files.made_by(folder) == (name, value.partition(":")[2])


@pytest.mark.parametrize("folder", ["runs/nothing", "runs/rfm_dit_nothing", "stage4"])
def test_other_folders_are_made_by_no_config(folder):
    assert config_files.made_by(folder) is None


def test_a_config_of_the_package_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = config_files.find("configs/sae_stage1.py")
    assert packaged == ROOT / "configs" / "sae_stage1.py"
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "sae_stage1.py"
    own.write_text("")
    assert config_files.find("configs/sae_stage1.py").resolve() == own
    with pytest.raises(ValueError, match=r"got 'sae_stage2.py'; did you mean 'configs/sae_stage2"):
        config_files.find("sae_stage2.py")
    with pytest.raises(
        ValueError, match=r"--config is a path on this machine; got 'https://x/y.py'"
    ):
        config_files.find("https://x/y.py")


@pytest.mark.slow
def test_every_job_refuses_the_workdir_of_another_run(tmp_path):
    with lease.hold(tmp_path):
        line = refusal("--config=configs/paper.py", f"--workdir={tmp_path}")
    assert f"one run at a time; got {tmp_path}, which process {os.getpid()} on" in line
    assert run_command("--config=configs/paper.py", f"--workdir={tmp_path}").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paper.md"]


def test_a_config_by_its_path_ignores_another_package_called_configs(tmp_path):
    """Named by its full path, from a folder with a package `configs` of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not this one')")
    done = run_command(f"--config={ROOT / 'configs' / 'paper.py'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This run's folder is runs/paper (--workdir names another)\n")
    assert (tmp_path / "runs" / "paper" / "paper.md").is_file()


def test_an_own_config_starts_from_one_of_the_package(tmp_path):
    (tmp_path / "configs").mkdir()
    text = "from configs import sae_stage1\n\ndef get_config(argument=None):\n"
    text += "    config = sae_stage1.get_config('tiny')\n    config.steps = 0\n    return config\n"
    (tmp_path / "configs" / "mine.py").write_text(text)
    line = refusal("--config=configs/mine.py", cwd=tmp_path)
    assert "steps must be above zero; got 0" in line


CHAIN, STAGE = "--config=configs/quickstart.py", "--config=configs/sae_stage1.py:tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [CHAIN, "--config.bacth_size=8"],
            "mean --config.stages.stage1.batch_size (also of stage2",
        ),
        ([STAGE, "--config.lr=1"], "config has no key 'lr'; did you mean --config.optimizer.learn"),
        ([STAGE, "--batch_size=8"], "--batch_size is not a flag; did you mean --config.batch_size"),
        ([STAGE, "--output=x"], "--output is not a flag; did you mean --workdir?"),
        ([STAGE, "--zzz"], "--zzz is not a flag; see --help"),
        (["--confg=configs/quickstart.py"], "--confg is not a flag; did you mean --config?"),
        ([STAGE, "--workdri=x"], "--workdri is not a flag; did you mean --workdir?"),
        ([STAGE, "--confg.steps=3"], "--confg.steps is not a flag; did you mean --config.steps?"),
        ([STAGE, "--workdir=az://b/run"], "--workdir is a path on this machine or one that begins"),
        (
            [STAGE, "--config.init_from=ftp://b"],
            "init_from is a path on this machine or one that begin",
        ),
        ([STAGE, "--config.seed=4294967296"], "seed must be a whole number from 0 to 2^32-1; got "),
    ],
)
def test_slips_are_answered_in_one_line(arguments, message, tmp_path):
    assert message in refusal(*arguments)


def test_what_is_missing_is_a_numbered_list_at_once(tmp_path):
    done = run_command("--config=configs/rfm_dit.py", cwd=tmp_path, TFDS_DATA_DIR=str(tmp_path))
    heading, *lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert heading.startswith("dinosae_jax: missing: runs/sae_stage4 (init_from), images")
    assert lines[-1].startswith("  9. python -m dinosae_jax.main --config=configs/rfm_dit.py")
    assert not list(tmp_path.iterdir())


def test_a_home_folder_in_a_config_field_is_expanded(tmp_path):
    arguments = ("--config=configs/sae_stage1.py:tiny", "--config.init_from=~/nothing")
    done = run_command(*arguments, HOME=str(tmp_path))
    assert f"missing: {tmp_path}/nothing (init_from)" in done.stderr


def test_an_absent_platform_is_one_line(tmp_path):
    line = refusal("--config=configs/paper.py", cwd=tmp_path, JAX_PLATFORMS="rocm")
    assert "JAX_PLATFORMS must name a platform of this machine and of this jax; got 'rocm'" in line
