"""An autoencoder stage that starts from published weights."""

import jax
import pytest

from configs import sae_stage4
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import autoencoder_task
from dinosae_jax.weights import checkpoint, weight_source
from tests import tiny
from tests.weights_conversion import layouts


def test_a_stage_continues_official_weights(data_dir, tmp_path):
    """Their file writes the same architecture in other words and leaves the teacher out."""
    tiny.write_images(tmp_path / "data")
    source = layouts.official(data_dir, tmp_path)
    config = sae_stage4.get_config("tiny")
    config.update_from_flattened_dict({**tiny.TINIEST, "losses.gan": 0.0})
    for role, part in weight_source.open_weights(source).model.items():
        given = {name: value for name, value in part.items() if name in config.model[role]}
        single = {n: v[0] if n in ("block_type", "norm", "act") else v for n, v in given.items()}
        config.model[role].update(
            {n: tuple(v) if isinstance(v, list) else v for n, v in single.items()}
        )
    config.data.source, config.init_from = f"folder:{tmp_path / 'data'}", str(source)
    mesh = sharding.make_mesh()
    task = autoencoder_task.prepare(precision.resolve_config(config), tmp_path, mesh)
    with jax.set_mesh(mesh), checkpoint.open_manager(tmp_path, keep=1) as manager:
        metrics = task.evaluate(task.restore(manager))
    assert list(metrics) == ["eval/psnr", "eval/l1"]
    config.trainable, config.losses.cosine, config.latent_noise.tau = ("stem", "decoder"), 0.5, 0.0
    with pytest.raises(ValueError, match="alignment needs the teacher"):
        autoencoder_task.prepare(precision.resolve_config(config), tmp_path, mesh)
    config.model.decoder.act = "relu"
    with pytest.raises(ValueError, match=r"another architecture: model.decoder.act: 'relu' here"):
        autoencoder_task.prepare(precision.resolve_config(config), tmp_path, mesh)
