"""What a stage does with its workdir when it is stopped in any phase, and what it refuses."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import sae_stage1, sae_stage4
from dinosae_jax.eval import robustness
from dinosae_jax.jobs import train
from dinosae_jax.runtime import lease, sharding, stopping
from dinosae_jax.train import autoencoder_evaluation, latent_norms
from dinosae_jax.weights import checkpoint
from tests import tiny

FIELDS = ("step", "params", "opt", "ema", "metrics", "key")
SMALL = {"steps": 4, "log_every": 1, "checkpoint.every": 2, "eval.every": 3, "mesh.fsdp": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_images(folder)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def make(data):
    def config(module=sae_stage1, **changes):
        result = module.get_config("tiny")
        values = {**tiny.TINIEST, **SMALL, "data.source": data}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        result.update_from_flattened_dict(values)
        return result

    return config


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """The workdir of a run of four steps; do not change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.run(make(), workdir)
    return workdir


def test_a_finished_stage_has_pictures_baselines_and_robustness(finished):
    for name in ("reconstructions.png", "baselines.json", "sphere.png"):
        assert (finished / name).is_file()
    rows = json.loads((finished / "robustness.json").read_text())
    assert [row["angle_degrees"] for row in rows] == list(robustness.ANGLES)
    # Unturned tokens give the reconstruction; both are means of the same three images.
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(rows[0]["psnr"] - last["eval/psnr"]) < 1e-3
    assert len({row["psnr"] for row in rows}) > 1


def same_run(ours, theirs):
    states = [
        checkpoint.load_fields(checkpoint.newest(folder), FIELDS)[0] for folder in (ours, theirs)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_interrupted_evaluation_is_made_when_the_run_resumes(
    make, finished, tmp_path, monkeypatch, evaluation
):
    """The first is at step 3, which no checkpoint is due at; the second ends the run."""
    real, count = autoencoder_evaluation.Evaluation.metrics, 0

    def interrupted(self, state):
        nonlocal count
        count += 1
        if count == evaluation:
            signal.raise_signal(signal.SIGHUP)
        return real(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder_evaluation.Evaluation, "metrics", interrupted)
        with pytest.raises(stopping.Interrupted, match=f"evaluation at step {2 + evaluation} of 4"):
            train.run(make(), tmp_path)
    assert checkpoint.newest(tmp_path).name == str(2 + evaluation)
    train.run(make(), tmp_path)
    same_run(tmp_path, finished)
    assert not (tmp_path / lease.FILE).exists()


def test_a_request_before_the_first_step_is_obeyed(make, tmp_path, monkeypatch):
    real = checkpoint.restore_newest

    def restore(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "restore_newest", restore)
    with pytest.raises(stopping.Interrupted, match="stopped before step 1"):
        train.run(make(), tmp_path)


@pytest.mark.slow
def test_token_norms_that_were_measured_are_kept(flow_workdir, tmp_path, monkeypatch):
    """Ten photographs are two batches; the signal comes with the first."""
    real, sizes = sharding.put_batch, []

    def counting(batch, mesh):
        sizes.append(len(batch["image"]))
        if len(sizes) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(batch, mesh)

    monkeypatch.setattr(sharding, "put_batch", counting)
    with pytest.raises(stopping.Interrupted, match="while it measured token norms, stopped"):
        train.run(tiny.small_flow(), tmp_path)
    assert sizes == [8]
    partial = np.load(tmp_path / latent_norms.PARTIAL_FILE)
    assert partial["rows"].shape == (8, 2)
    sizes[:] = [0]
    with monkeypatch.context() as patch:
        patch.setattr(latent_norms, "_write_partial", None)  # is not needed again
        patch.setattr(checkpoint, "restore_newest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny.small_flow(), tmp_path)
    assert sizes == [0, 8]
    ours, theirs = (
        json.loads((folder / latent_norms.NORMS_FILE).read_text())
        for folder in (tmp_path, flow_workdir)
    )
    assert ours == theirs
    assert not (tmp_path / latent_norms.PARTIAL_FILE).exists()


def test_norms_of_another_encoder_are_measured_again(flow_workdir, tmp_path):
    norms = json.loads((flow_workdir / latent_norms.NORMS_FILE).read_text())
    (tmp_path / latent_norms.NORMS_FILE).write_text(json.dumps(norms))
    assert latent_norms._read_norms(tmp_path, norms["of"]) == norms
    assert latent_norms._read_norms(tmp_path, "other") is None


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_starts_at_step_0_unless_it_is_told_to(make, finished, tmp_path, damaged):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    if damaged:
        for record in (workdir / checkpoint.FOLDER).glob("*/record/metadata"):
            record.write_text("{")
    else:
        shutil.rmtree(workdir / checkpoint.FOLDER)
    for message in (
        ("on_mismatch=restart to start", "starts at step 0 only")
        if damaged
        else (
            "starts at step 0 only where it is told to; got no checkpoint, but .*step 4 was saved",
        )
    ):
        with pytest.raises(ValueError, match=message):
            train.run(make(steps=5), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    train.run(make(on_mismatch="restart", steps=5), workdir)
    assert checkpoint.newest(workdir).name == "5"


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(make, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / checkpoint.FOLDER)
    checkpoint.note_newest(workdir, None)
    train.run(make(), workdir)
    same_run(workdir, finished)


def test_an_unfinished_run_is_continued_only_by_its_checkpoint(make, finished, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(finished, before)
    stage4 = {"steps": 1, "losses__gan": 0.0, "latent_noise__tau": 0.0}
    train.run(make(sae_stage4, init_from=str(before), **stage4), tmp_path / "four")
    record = checkpoint.read_record(checkpoint.newest(tmp_path / "four"))
    folder = before / checkpoint.FOLDER / "4"
    sha256 = json.loads((folder / "record" / "metadata").read_text())["sha256"]
    assert record["source"] == {"path": str(folder), "step": 4, "sha256": sha256}
    (before / "DONE").write_text('{"step": 2}')  # it was made longer
    with pytest.raises(ValueError, match=rf"finished run; got .*--config.init_from={folder}"):
        train.run(make(sae_stage4, init_from=str(before), **stage4), tmp_path / "x")


@pytest.mark.slow
def test_a_checkpoint_is_a_start_whether_or_not_its_run_is_finished(make, finished, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(finished, before)
    (before / "DONE").unlink()
    stage4 = {"steps": 1, "losses__gan": 0.0, "latent_noise__tau": 0.0}
    folder = before / checkpoint.FOLDER / "4"
    train.run(make(sae_stage4, init_from=str(folder), **stage4), tmp_path / "run")
    record = checkpoint.read_record(checkpoint.newest(tmp_path / "run"))
    assert record["source"]["path"] == str(folder)


def test_a_second_run_in_a_workdir_is_refused(make, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / lease.FILE).write_text(
        json.dumps({"token": "t", "machine": "m", "host": "h", "pid": 1, "since": "noon"})
    )
    with pytest.raises(ValueError, match=r"one run at a time; got .*process 1 on h \(since noon\)"):
        train.run(make(steps=9), tmp_path / "run")
