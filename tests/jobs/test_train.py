"""The training job end to end: resume is bitwise, runs are not mixed up, nothing is lost."""

import errno
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import quickstart, sae_stage1, sae_stage4
from dinosae_jax import main
from dinosae_jax.jobs import train
from dinosae_jax.runtime import files, stopping
from dinosae_jax.train import loop, preparation, stages
from dinosae_jax.weights import checkpoint
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
TINIEST = {
    "steps": 6,
    "batch_size": 8,
    "log_every": 3,
    "checkpoint.every": 2,
    "eval.every": 3,
    "eval.images": 8,
    "eval.batch_size": 8,
    **tiny.SMALLEST,
}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A data folder of this test session, so that nothing is written to the home folder."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def make(photos):
    def config(module=sae_stage1, **changes):
        result = module.get_config("tiny")
        values = {"data.data_dir": photos, **TINIEST}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        result.update_from_flattened_dict(values)
        return result

    return config


def last_state(workdir):
    folder = checkpoint.newest(workdir)
    fields = ("step", "params", "opt", "ema", "extra", "metrics", "key", "skipped")
    return checkpoint.load_fields(folder, fields)[0]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def interrupt_after(monkeypatch, steps):
    """Makes the loop see SIGTERM after `steps` steps of this process."""
    real = loop.sharding.put_batch
    seen = {"count": 0}

    def counting(batch, mesh):
        if set(batch) == {"image"} and batch["image"].shape[0] == 8:
            seen["count"] += 1
            if seen["count"] == steps:
                signal.raise_signal(signal.SIGTERM)
        return real(batch, mesh)

    monkeypatch.setattr(loop.sharding, "put_batch", counting)


@pytest.mark.slow  # in the fast suite: of a shorter run, in tests/train/test_stages.py
@pytest.mark.parametrize("stop", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(make, tmp_path, monkeypatch, stop):
    train.run(make(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(stopping.Interrupted, match="of 6"):
            train.run(make(), tmp_path / "parts")
    assert int(last_state(tmp_path / "parts")["step"]) < 6
    assert not (tmp_path / "parts" / "DONE").exists()
    train.run(make(), tmp_path / "parts")
    same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))
    whole, parts = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "parts"))
    assert whole == parts
    assert (tmp_path / "parts" / "DONE").exists()


@pytest.mark.slow
def test_train_n_then_2n_equals_2n(make, tmp_path):
    """Nor does a profile change anything."""
    train.run(make(steps=6, profile_steps="2:4"), tmp_path / "whole")
    assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))
    timing = (tmp_path / "whole" / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["tflops_per_device"] > 0 for line in timing] == [True, True]
    train.run(make(steps=3), tmp_path / "parts")
    train.run(make(steps=6), tmp_path / "parts")
    same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))
    whole, parts = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(make, tmp_path, monkeypatch, capsys):
    train.run(make(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(stopping.Interrupted):
            train.run(make(), tmp_path / "parts")
    newest = checkpoint.newest(tmp_path / "parts")
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damage")
    train.run(make(), tmp_path / "parts")
    assert "is damaged" in capsys.readouterr().out
    same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))


@pytest.mark.slow
def test_another_config_is_refused(make, tmp_path):
    train.run(make(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"of a different run \(losses.l1: 2.0 here, 1.0 there"):
        train.run(make(losses__l1=2.0), tmp_path)
    train.run(make(steps=2, losses__l1=2.0, on_mismatch="continue"), tmp_path)


@pytest.mark.parametrize(
    ("file", "is_chain", "what"),
    [
        ("chain.json", False, "a chain of stages"),
        ("config.json", True, "the run of one stage"),
        ("export.json", False, "an export"),
        ("conversion.json", True, "converted weights"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, file, is_chain, what):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=f"holds {what} .*; use another"):
        stages.check_kind(tmp_path, is_chain)
    (tmp_path / file).unlink()
    (tmp_path / ("chain.json" if is_chain else "config.json")).write_text("{}")
    stages.check_kind(tmp_path, is_chain)


def test_a_finished_run_without_checkpoints_is_still_that_run(make, tmp_path):
    stages.claim(tmp_path, make())
    (tmp_path / stages.DONE).write_text('{"step": 6}')
    with pytest.raises(ValueError, match="of a different run"):
        stages.claim(tmp_path, make(losses__l1=2.0))


def test_a_chain_names_the_stage_of_a_mistake_and_can_be_moved(make, tmp_path, monkeypatch):
    """Its config.json files hold names of stages, not places; messages name its own flags."""
    config = quickstart.get_config("tiny")
    seen = []

    def run_stage(stage, workdir, stop, earlier):
        stages.claim(workdir, stage)
        seen.append(earlier.get(stage.init_from))

    monkeypatch.setattr(stages, "run_stage", run_stage)
    for name in config.chain:
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / stages.DONE).write_text('{"step": 4}')
    train.run(config, tmp_path / "here")
    assert seen == [None, *(tmp_path / "here" / name for name in config.chain[:-1])]
    (tmp_path / "here").rename(tmp_path / "there")
    train.run(config, tmp_path / "there")
    config.stages.stage3.losses.l1 = 2.0
    flag = r"--config.stages.stage3.on_mismatch=continue"
    with pytest.raises(ValueError, match=rf"^stages.stage3: .*losses.l1: 2.0 here.*{flag}"):
        train.run(config, tmp_path / "there")


def test_a_place_spelled_otherwise_is_no_other_config(make, tmp_path):
    (tmp_path / "run" / "checkpoints" / "2" / "state").mkdir(parents=True)
    run = files.path(tmp_path / "run")
    start = tmp_path / "start"
    assert not stages.claim(run, make(init_from=str(start), data__source="folder:photos"))
    assert checkpoint.newest(run)
    same_place = make(init_from=f"{start}/../start/", data__source="folder:./photos/")
    assert not stages.claim(run, same_place)
    kept = (run / "config.json").read_text()
    for moved in ({"init_from": "elsewhere"}, {"weights__vit": "v"}, {"data__source": "folder:b"}):
        there = {"init_from": str(start), "data__source": "folder:photos", **moved}
        assert stages.claim(run, make(**there)), moved
        assert (run / "config.json").read_text() == kept, "written before the contents were seen"
        with pytest.raises(ValueError, match=r"losses\.l1: 2.0 here"):
            stages.claim(run, make(losses__l1=2.0, **there))


@pytest.mark.slow
def test_places_are_compared_by_what_they_hold(make, tmp_path, capsys):
    for seed in (0, 1):
        train.run(make(steps=1, seed=seed), tmp_path / f"one{seed}")

    def stage4(start, steps):
        changes = {"steps": steps, "losses__gan": 0.0, "init_from": str(tmp_path / start)}
        train.run(make(sae_stage4, **changes), tmp_path / "four")

    stage4("one0", 1)
    for steps in (2, 1):  # a run that would go on, and a finished one
        with pytest.raises(ValueError, match=r"continues one start; got other weights in .*one1"):
            stage4("one1", steps)
    settings = tmp_path / "four" / "config.json"
    assert json.loads(settings.read_text())["init_from"] == str(tmp_path / "one0")
    (tmp_path / "one0").rename(tmp_path / "moved")
    capsys.readouterr()
    stage4("moved", 1)
    assert "finished before, skipped; its inputs have moved" in capsys.readouterr().out
    assert json.loads(settings.read_text())["init_from"] == str(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "again")
    stage4("again", 2)
    assert int(last_state(tmp_path / "four")["step"]) == 2


def test_other_frozen_networks_than_a_checkpoints_are_refused():
    saved = {"frozen": {"stem": ["stem.0a", "0a"], "vit": ["vit.0b", "0b"]}}
    preparation.check_frozen(saved, {"frozen": {"vit": ["vit.0b", "0b"]}})
    other = {"frozen": {"stem": ["stem.1a", "1a"], "vit": ["vit.1b", "1b"]}}
    with pytest.raises(ValueError, match="frozen networks throughout; got another stem and vit"):
        preparation.check_frozen(saved, other)


@pytest.mark.slow
def test_stage4_continues_stage1_and_agreement_is_checked(make, tmp_path):
    train.run(make(steps=2), tmp_path / "one")
    stage4 = {"init_from": str(tmp_path / "one"), "losses__gan": 0.0, "steps": 2}
    train.run(make(sae_stage4, **stage4), tmp_path / "four")
    before, after = last_state(tmp_path / "one"), last_state(tmp_path / "four")
    assert set(after["params"]) == {"decoder"}
    assert set(before["params"]) == {"stem", "decoder"}
    record = json.loads(
        json.dumps(checkpoint.load_fields(checkpoint.newest(tmp_path / "four"), ("step",))[1])
    )
    assert set(record["frozen"]) == {"stem", "vit"}
    with pytest.raises(ValueError, match=r"another architecture: model.decoder.act"):
        train.run(make(sae_stage4, **stage4, model__decoder__act="relu"), tmp_path / "x")
    with pytest.raises(ValueError, match=r"latent conventions of .*pixels unit != imagenet"):
        train.run(make(sae_stage4, **stage4, model__pixel_range="unit"), tmp_path / "y")
    with pytest.raises(ValueError, match="does not exist"):
        train.run(make(sae_stage4, **{**stage4, "init_from": "nowhere"}), tmp_path / "z")


def test_missing_frozen_networks_stop_with_the_command(make, tmp_path):
    with pytest.raises(ValueError, match=r"weights_conversion.convert --kind=dinov3"):
        train.run(make(random_frozen_ok=()), tmp_path)


def test_a_batch_that_does_not_divide_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="multiple of the number of devices; got 12 / 1 = 12"):
        train.run(make(batch_size=12), tmp_path)


@pytest.mark.slow
def test_non_finite_steps_stop_the_run_with_the_batch(make, tmp_path):
    config = make(optimizer__learning_rate=1e30, skip_limit=2, steps=9)
    with pytest.raises(FloatingPointError, match="in a row with a non-finite"):
        train.run(config, tmp_path)
    (dump,) = tmp_path.glob("bad_batch_*.npz")
    assert np.load(dump)["image"].shape == (8, 32, 32, 3)


def run_command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "dinosae_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.losses.gam=1"], "config.losses has no key 'gam'; did you mean 'gan'"),
        (["--config.stepz=1"], "config has no key 'stepz'; did you mean 'steps'"),
        (["--config.steps=0"], "steps must be above zero; got 0"),
        (["--config.steps=many"], "config.steps takes int; got 'many'"),
        (["--config.stepz", "1"], "config has no key 'stepz'; did you mean 'steps'"),
        (["--config.optimizer=3"], "config.optimizer is a group of fields; got '3'"),
        ([f"--workdir={__file__}"], "--workdir names a folder; got "),
        (["left over"], "only flags are understood; got 'left over'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, arguments, message):
    result = run_command("--config=configs/sae_stage1.py:tiny", f"--workdir={tmp_path}", *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--workdir=x"], 2, "--config is needed; got none"),
        (["--config=configs/sae_stage.py"], 2, "did you mean 'configs/sae_stage"),
        (["--help"], 0, ""),
    ],
)
def test_what_is_needed_is_said_in_one_line(arguments, code, message):
    result = run_command(*arguments)
    assert (result.returncode, "Traceback" in result.stderr) == (code, False)
    assert message in result.stderr


def test_a_full_disk_is_one_line(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")
    assert main._refuse(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dinosae_jax: [Errno 28] No space left on device: 'run/metrics.jsonl'; ")
    assert line.endswith("run the same command again")


def test_a_wrong_variant_is_one_line(tmp_path):
    result = run_command("--config=configs/sae_stage1.py:tinny", f"--workdir={tmp_path}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "did you mean 'tiny'" in result.stderr


@pytest.mark.slow
def test_kill_and_go_on(photos, tmp_path):
    """Kill -9 at an arbitrary moment, then the same command: equal to the uninterrupted run."""
    overrides = {**TINIEST, "data.data_dir": photos, "steps": 30, "log_every": 5, "eval.every": 10}
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = ["--config=configs/sae_stage1.py:tiny", *flags]
    assert run_command(*command, f"--workdir={tmp_path / 'whole'}").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "dinosae_jax.main", *command, f"--workdir={tmp_path / 'parts'}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while checkpoint.newest(tmp_path / "parts") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "parts" / "DONE").exists()
    result = run_command(*command, f"--workdir={tmp_path / 'parts'}")
    assert result.returncode == 0, result.stderr
    same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))
    whole, parts = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
def test_the_quickstart_chain(photos, tmp_path, capsys):
    config = quickstart.get_config("tiny")
    for name in config.chain:
        stage = config.stages[name]
        changes = {"data.data_dir": photos, "steps": 2, "batch_size": 8, "eval.images": 8}
        stage.update_from_flattened_dict(changes)
    train.run(config, tmp_path)
    for name in config.chain:
        assert (tmp_path / name / "DONE").exists(), name
    for name in ("report.html", "reconstructions.png", "curves.png", "metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 0, name
    text = (tmp_path / "report.html").read_text()
    assert text.index("randomly initialised") < text.index("<table")
    capsys.readouterr()
    train.run(config, tmp_path)
    assert capsys.readouterr().out.count("finished before, skipped") == len(config.chain)
