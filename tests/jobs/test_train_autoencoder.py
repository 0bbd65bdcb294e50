"""The last files of an autoencoder stage."""

import json

import jax

from dinosae_jax.eval import robustness
from dinosae_jax.train import checkpoint
from tests import tiny_stage


def test_a_finished_stage_has_pictures_baselines_and_robustness(tmp_path):
    prepared, mesh = tiny_stage.prepare(tmp_path)
    with jax.set_mesh(mesh), checkpoint.open_manager(tmp_path / "stage", keep=1) as manager:
        state = prepared.restore(manager)
        figures = prepared.task.evaluate(state)
        prepared.finish(state)
    for name in ("reconstructions.png", "baselines.json"):
        assert (tmp_path / "stage" / name).is_file()
    rows = json.loads((tmp_path / "stage" / "robustness.json").read_text())
    assert [row["angle_degrees"] for row in rows] == list(robustness.ANGLES)
    # Unturned tokens give the reconstruction; both are means of the same three images.
    assert abs(rows[0]["psnr"] - figures["eval/psnr"]) < 1e-3
    assert len({row["psnr"] for row in rows}) > 1
