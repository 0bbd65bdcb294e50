"""Statistics of latents: measured once at the start, those of numpy, carried on to the flow."""

import jax
import numpy as np
import pytest

from configs import rae_decoder, rae_dit
from dinosae_jax import rules
from dinosae_jax.data import images, png
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.inference.generator import Generator
from dinosae_jax.runtime import sharding
from dinosae_jax.train import latent_statistics, stages
from tests.tiny import images as pictures_of

SIDE = 4


def small(module, **changes):
    config = module.get_config("tiny")
    short = {"steps": 2, "batch_size": 8, "eval.every": 2, "eval.batch_size": 5, "data.threads": 0}
    config.update_from_flattened_dict({**short, "data.source": "photos/72", **changes})
    return config


def test_moments_of_batches_are_those_of_all_latents(tmp_path, monkeypatch):
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (15, SIDE**2, 6)).astype(np.float32)
    parts = [(part.mean(axis=0), part.var(axis=0)) for part in np.split(drawn, 3)]
    batches = iter(parts)
    monkeypatch.setattr(latent_statistics, "_moments", lambda *_: lambda batch: next(batches))
    monkeypatch.setattr(latent_statistics.loading, "training_batches", lambda *_: iter(range(99)))
    config, mesh = small(rae_decoder), sharding.make_mesh(devices=jax.devices()[:1])
    config.eval.batch_size = 5
    arguments = (None, None, range(15), latent_statistics.epath.Path(tmp_path), mesh)
    found = latent_statistics.measure(config, *arguments, "a")
    mean, variance = drawn.astype(np.float64).mean(axis=0), drawn.astype(np.float64).var(axis=0)
    np.testing.assert_allclose(found["mean"], mean.T.reshape(6, SIDE, SIDE), rtol=1e-5)
    np.testing.assert_allclose(found["variance"], variance.T.reshape(6, SIDE, SIDE), rtol=1e-5)
    again = latent_statistics.measure(config, *arguments, "a")  # no batch is left
    np.testing.assert_array_equal(again["variance"], found["variance"])
    batches, config.model.decoder.statistics_side = iter(parts), 1
    one = latent_statistics.measure(config, *arguments, "of other latents")
    np.testing.assert_allclose(one["mean"][:, 0, 0], drawn.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(one["variance"][:, 0, 0], drawn.var(axis=(0, 1)), rtol=1e-4)


def test_a_decoder_without_room_or_with_statistics_measures_none():
    assert not latent_statistics.are_missing({"params": {}})
    measured = {"mean": np.ones((6, 1, 1)), "variance": np.ones((6, 1, 1))}
    assert not latent_statistics.are_missing({"statistics": measured})
    assert latent_statistics.are_missing({"statistics": {**measured, "mean": 0 * measured["mean"]}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.decoder.statistics": "deviation"}, "as 'variance', around a frozen stem; got"),
        (
            {"trainable": ("stem", "decoder"), "latent_noise.tau": 0.0},
            "around a frozen stem; got statistics='variance'",
        ),
        ({"model.decoder.statistics_side": 3}, "4 a side, or one value per channel; got .*=3; set"),
    ],
)
def test_statistics_that_cannot_be_measured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        rules.validate(small(rae_decoder, **changes))
    assert "\n" not in str(error.value)


def test_a_decoder_that_is_trained_on_keeps_the_statistics_that_it_brings():
    rules.validate(small(rae_decoder, init_from="w", **{"model.decoder.statistics": "deviation"}))


@pytest.mark.slow
def test_a_flow_runs_on_the_statistics_of_its_decoder(tmp_path):
    """Trained latents have mean 0 and deviation 1; samples are restored before decoding."""
    root = latent_statistics.epath.Path(tmp_path)
    for number, picture in enumerate(pictures_of(40, 72, 80)):  # full batches of 8, ten classes
        for split in ("train", "val"):
            place = root / "images" / split / str(number % 10)
            place.mkdir(parents=True, exist_ok=True)
            png.write_png(place / f"{number}.png", picture)
    data = {"data.source": f"folder:{root / 'images'}"}
    decoder = small(rae_decoder, **data)
    stages.run_stage(decoder, root / "decoder")
    autoencoder = Autoencoder.load(root / "decoder")
    source = images.open_images(decoder.data, "train")
    crop = images.CropRecipe(decoder.data.image_size, "center", 0, False).evaluate
    pictures = np.stack([crop(source[i]["image"]) for i in range(len(source))])
    z = autoencoder.encode(pictures / np.float32(255))
    statistics = autoencoder.variables["decoder"]["statistics"]
    wanted = {"mean": z.mean(axis=0), "variance": z.var(axis=0)}
    for name, each in wanted.items():
        np.testing.assert_allclose(statistics[name], each.T.reshape(-1, SIDE, SIDE), atol=2e-5)
    flow = small(rae_dit, init_from=str(root / "decoder"), **{"eval.samples": 0, **data})
    rules.validate(flow)
    stages.run_stage(flow, root / "flow")
    generator = Generator.load(root / "flow")
    np.testing.assert_array_equal(
        generator.variables["decoder"]["statistics"]["mean"], statistics["mean"]
    )
