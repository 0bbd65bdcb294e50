"""What a comparison says of autoencoders: classes, exchanged norms, partners, floors, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablation_sae
from dinosae_jax.eval import features
from dinosae_jax.eval.protocols import autoencoder_comparison, photographs
from dinosae_jax.report import comparison_tables

SIDE = 16


class Blocks:
    """An autoencoder whose token is the mean colour of an image, and which paints it."""

    def encode(self, images):
        return np.asarray(images).mean(axis=(1, 2))[:, None]

    encode_teacher = encode

    def decode(self, z):
        return np.clip(np.broadcast_to(z[:, :, None], (len(z), SIDE, SIDE, 3)), 0.0, 1.0)


def mean_colour(variables, images):
    return {"mean": jnp.mean(images.astype(jnp.float32), axis=(1, 2)) / 255.0 - 0.3}


NETWORK = features.FeatureNetwork(
    "mean colour", "", "", features._distances_in("colour", "mean"), {}, jax.jit(mean_colour)
)


@pytest.fixture
def judge(monkeypatch):
    """A judge of plain images: the class is the hue, the brightness is the image's own."""
    hues = np.eye(3) * 0.8 + 0.1

    def read(data, split, count):
        random = np.random.default_rng(split == "eval")
        labels = np.sort(random.integers(0, 3, count)).astype(np.int32)
        colours = hues[labels] * random.uniform(0.3, 1.0, (count, 1))
        images = np.broadcast_to(255 * colours[:, None, None], (count, SIDE, SIDE, 3))
        return images.astype(np.uint8), labels

    monkeypatch.setattr(photographs, "read", read)
    config = ablation_sae.get_config("tiny")
    config.update(dict(images=60, known=90, batch_size=32, kernel_subset_size=30))
    return autoencoder_comparison.Judge(config, NETWORK)


def test_directions_carry_the_hue_and_norms_the_brightness(judge):
    score = judge(Blocks())
    assert score["psnr"] > 45  # plain images but for the rounding
    assert score["ssim"] > 0.99
    assert score["distance"] < 1e-3
    assert score["linear"] == score["neighbours"] == score["class_of_image"] == 1.0
    assert score["mixed_class_direction"] == score["mixed_class_of_image_direction"] == 1.0
    assert score["mixed_class_norm"] == score["mixed_class_of_image_norm"] == 0.0
    assert score["mixed_psnr_direction"] < score["psnr"] - 20
    assert score["even_class_of_image"] == 1.0
    assert score["even_psnr"] < score["psnr"] - 20
    assert judge.teacher(Blocks()) == {"neighbours": 1.0, "linear": 1.0}


def test_the_floor_is_that_of_other_photographs(judge):
    floor, own = judge.photographs.floor(60), judge(Blocks())
    assert abs(floor["kernel"]) < 20
    assert abs(own["frechet"]) < 1e-6 < floor["frechet"]
    black = np.zeros_like(judge.photographs.held_out)
    worse = judge.photographs.measure(judge.photographs.embed(black), judge.photographs.labels)
    assert worse["frechet"] > 10 * floor["frechet"]
    assert worse["class_of_image"] < 0.5


def test_every_image_has_a_partner_of_another_class():
    labels = np.asarray([2, 0, 0, 1, 1, 1, 2, 2], np.int32)
    partner = autoencoder_comparison._partners(labels)
    assert sorted(partner) == list(range(8))
    assert (labels[partner] != labels).all()
    with pytest.raises(ValueError, match=r"more than half .*; got 3 of 5"):
        autoencoder_comparison._partners(np.asarray([0, 0, 0, 1, 2], np.int32))


def test_photographs_are_spread_over_a_split():
    assert photographs.spread(4, 10).tolist() == [0, 2, 5, 7]
    assert photographs.spread(9, 3).tolist() == [0, 1, 2]


def test_the_tables_have_every_score(judge):
    config = ablation_sae.get_config()
    config.order, config.seeds = ("cosine, conv stem",), (0, 1)
    score = judge(Blocks())
    other = {name: value + 2 for name, value in score.items()}
    scores = {
        "photographs": judge.photographs.floor(60),
        "teacher": judge.teacher(Blocks()),
        "cosine, conv stem, seed 0": score,
        "cosine, conv stem, seed 1": other,
    }
    text = comparison_tables.autoencoder_tables(config, scores, NETWORK)
    first, second = text.split("\n\n")[1:]
    assert first.count("\n") == 4
    assert "| teacher | - | - | - | - | - | - | 100 | 100 |" in first
    assert "FD colour | KID colour x 1000" in first
    assert f"{score['psnr'] + 1:.4g} ± 1.4" in first
    assert second.count("±") == len(comparison_tables.EXCHANGED)
    named = {*comparison_tables.EXCHANGED, "psnr", "ssim", "distance", "neighbours", "linear"}
    assert set(score) == named | {"frechet", "kernel", "class_of_image"}
