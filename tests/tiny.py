"""The tiny world of the tests: the smallest autoencoder and flow, and workdirs of them."""

import numpy as np

from configs import rfm_dit, sae_stage1
from dinosae_jax.data import png
from dinosae_jax.eval import adm_moments
from dinosae_jax.runtime import files, precision, sharding
from dinosae_jax.train import autoencoder_task
from dinosae_jax.weights import checkpoint, weight_source

SMALLEST = {
    "model.stem.embed_dim": 32,
    "model.stem.widths": (8, 8, 16),
    "model.vit.embed_dim": 32,
    "model.vit.depth": 1,
    "model.vit.num_heads": 2,
    "model.vit.ffn_hidden": 64,
    "model.vit.num_storage_tokens": 2,
    "model.decoder.latent_channels": 32,
    "model.decoder.width_list": (8, 8, 16, 16, 32),
    "model.decoder.depth_list": (0, 1, 1, 1, 1),
    "data.image_size": 32,
}
TINIEST = {
    "steps": 1,
    "batch_size": 8,
    "eval.batch_size": 8,
    "eval.images": 8,
    "data.threads": 0,
    **SMALLEST,
}


def images(count, height, width, seed=0):
    """Smooth random pictures, uint8 [count,height,width,3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, height // 8, width // 8, 3))
    return coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


def write_images(folder):
    """Three pictures for training and three for evaluation, a folder of one class each."""
    for split in ("train", "val"):
        place = folder / split / "one"
        place.mkdir(parents=True)
        for number, picture in enumerate(images(3, 40, 48)):
            png.write_png(place / f"{number}.png", picture)


def prepare(folder):
    """(task, mesh) of `folder`/stage on pictures in `folder`/data."""
    write_images(folder / "data")
    config = sae_stage1.get_config("tiny")
    config.update_from_flattened_dict(TINIEST)
    config.data.source = f"folder:{folder / 'data'}"
    config = precision.resolve_config(config)
    mesh = sharding.make_mesh()
    workdir = folder / "stage"
    workdir.mkdir()
    return autoencoder_task.prepare(config, workdir, mesh), mesh


def write(folder):
    """The workdir of a stage that ended at step 0, with a checkpoint and its frozen networks."""
    task, _ = prepare(folder)
    with checkpoint.open_manager(folder / "stage", keep=1) as manager:
        state = task.restore(manager)
        checkpoint.save(manager, state, task.record)
        checkpoint.wait(manager)
    files.write_json(folder / "stage" / weight_source.DONE, {"step": 0})
    return folder / "stage"


def model():
    """Model config of the smallest autoencoder."""
    config = sae_stage1.get_config("tiny")
    config.update_from_flattened_dict(TINIEST)
    return config.model.to_dict()


def small_flow(**changes):
    """The smallest flow: two steps of eight images; changes are {dotted field: value}."""
    config = rfm_dit.get_config("tiny")
    config.name = "flow"
    config.steps, config.batch_size = 2, 8
    config.eval.update({"every": 1, "batch_size": 8, "images": 8, "samples": 12})
    config.checkpoint.every, config.log_every = 2, 1
    config.sampling.steps = 4
    config.ema = 0.0  # so that two steps show in what is sampled
    config.model.dit.update({"hidden_size": 32, "depth": 1, "num_heads": 2})
    config.update_from_flattened_dict(changes)
    return config


def write_reference(path, images, pool, spatial):
    """A reference file as ADM publishes them: images, and moments with their recipe."""
    members = {"recipe": np.asarray(pool.recipe.to_json())}
    for tap, moments in (("pool3", pool), ("spatial", spatial)):
        values = (moments.mean, moments.covariance)
        members |= dict(zip(adm_moments.MOMENTS[tap], values, strict=True))
    np.savez(path, arr_0=images, **members)
