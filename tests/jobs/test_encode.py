"""The encode job and training on its cache: what agrees with encoding on the fly, what does not."""

import json
import shutil

import numpy as np
import pytest

from configs import encode as encode_config
from dinosae_jax import rules
from dinosae_jax.data import images
from dinosae_jax.data.latents import latent_reader, latent_record, latent_writer
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.jobs import encode
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import flow_evaluation, flow_task, latent_cache, stages
from tests import tiny
from tests.tiny import small_flow

SIDE = tiny.TINIEST["data.image_size"]
TOKENS, WIDTH = (SIDE // 16) ** 2, tiny.TINIEST["model.vit.embed_dim"]


@pytest.fixture(scope="module")
def root(stage_workdir, tmp_path_factory):
    """A trained stage in `stage`, its pictures in `data`, its latents in `cache`."""
    root = tmp_path_factory.mktemp("encode") / "root"
    shutil.copytree(stage_workdir.parent, root)
    encode.run(config_of(root), root / "cache")
    return root


def config_of(root, **changes):
    config = encode_config.get_config("tiny")
    config.init_from = str(root / "stage")
    config.data.update(source=f"folder:{root / 'data'}", image_size=SIDE, flip=True)
    config.num_shards = 2
    config.update_from_flattened_dict(changes)
    rules.validate(config)
    return config


def test_a_flat_validation_folder_is_refused_by_encode_and_by_the_flow(root, tmp_path):
    shutil.copytree(root / "data" / "train", tmp_path / "train")
    (tmp_path / "train" / "one").rename(tmp_path / "train" / "two")
    shutil.copytree(root / "data" / "train" / "one", tmp_path / "train" / "one")
    shutil.copytree(root / "data" / "val" / "one", tmp_path / "val")
    source = {"data.source": f"folder:{tmp_path}"}
    with pytest.raises(ValueError, match=r"labels are needed.* has no class folders"):
        encode.run(config_of(root, **source), tmp_path / "cache")
    flow = flow_of(root, **source, **{"data.latents": ""})
    with pytest.raises(ValueError, match=r"labels are needed.* has no class folders"):
        flow_task.open_flow_data(flow, "eval")
    assert flow_task.open_flow_data(flow, "train").label_names == ("one", "two")


def flow_of(root, **changes):
    tiniest = {
        name: value for name, value in tiny.TINIEST.items() if name.startswith(("model.", "data."))
    }
    return small_flow(
        **{
            **tiniest,
            "init_from": str(root / "stage"),
            "steps": 2,
            "sampling.steps": 1,
            "data.source": f"folder:{root / 'data'}",
            "data.crop": "center",
            "data.flip": True,
            "data.latents": str(root / "cache"),
            "model.dit.in_channels": WIDTH,
            "model.dit.input_size": SIDE // 16,
            "model.dit.num_classes": 1,
            "flow.radius": WIDTH**0.5,
            **changes,
        }
    )


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_configs_are_valid():
    for argument in ("tiny", "int8,tiny"):
        rules.validate(encode_config.get_config(argument))
    with pytest.raises(ValueError, match="encode needs trained weights"):
        config = encode_config.get_config()
        config.init_from = ""
        rules.validate(config)
    config = encode_config.get_config("tiny")
    config.data.crop = "random"
    with pytest.raises(ValueError, match=r"encode needs data\.crop='center'"):
        rules.validate(config)
    with pytest.raises(ValueError, match=r"latent cache needs data\.crop='center'"):
        rules.validate(small_flow(**{"data.latents": "caches/x", "data.crop": "random"}))


def test_the_cache_holds_latents_of_images_and_of_flipped_images(root):
    config = flow_of(root)
    source = latent_reader.open_latents(config.data, "train")
    assert source.manifest["norms"]["tokens"] == 3 * 2 * TOKENS
    autoencoder = Autoencoder.load(root / "stage")
    pictures = images.open_images(config.data, "train")
    recipe = images.recipe_of(config.data)
    for index in range(3):
        picture = recipe.evaluate(pictures[index]["image"]).astype(np.float32) / 255.0
        for flip in (False, True):
            view = picture[:, ::-1] if flip else picture
            batch = latent_record.empty_batch(source.fields, 1)
            source.read_into(batch, 0, index, flip)
            wanted = autoencoder.encode(view[None])
            np.testing.assert_allclose(  # half a step of bfloat16, and the batch's own rounding
                np.asarray(batch["latent"], np.float32), wanted, rtol=2**-8, atol=1e-5
            )


def test_run_again_it_keeps_good_shards_and_repairs_damaged_ones(root, tmp_path):
    config = config_of(root)
    workdir = tmp_path / "cache"
    encode.run(config, workdir)
    first, second = sorted((workdir / "train").glob("*.array_record"))
    manifest = (workdir / "train" / "manifest.json").read_text()
    written = first.stat().st_mtime_ns
    second.unlink()
    encode.run(config, workdir)
    assert first.stat().st_mtime_ns == written
    assert (workdir / "train" / "manifest.json").read_text() == manifest
    kept = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match="holds one with format bfloat16 instead of int8"):
        encode.run(config_of(root, format="int8"), workdir)
    assert (workdir / "config.json").read_text() == kept


def test_two_processes_write_what_one_does(root, tmp_path, monkeypatch):
    config = config_of(root)
    for number in (1, 0, 1):  # one after the other, so each lacks the other's shards at first
        monkeypatch.setattr(latent_cache, "_process", lambda number=number: (number, 2))
        with pytest.raises(ValueError, match=r"readable manifest|lacks number 1"):
            encode.run(config, tmp_path)
    monkeypatch.setattr(latent_cache, "_process", lambda: (0, 2))
    encode.run(config, tmp_path)
    for split in latent_cache.SPLITS:
        ours, theirs = (
            json.loads((folder / split / "manifest.json").read_text())
            for folder in (tmp_path, root / "cache")
        )
        assert ours == theirs


@pytest.mark.slow
def test_training_on_the_cache_agrees_with_encoding_on_the_fly(root, tmp_path):
    stages.run_stage(flow_of(root), tmp_path / "cached")
    stages.run_stage(flow_of(root, **{"data.latents": ""}), tmp_path / "encoded")
    rows, others = metrics(tmp_path / "cached"), metrics(tmp_path / "encoded")
    assert len(rows) == len(others) >= 3
    assert any(flow_evaluation.KID in row for row in rows)
    for row, other in zip(rows, others, strict=True):
        for name in set(row) - {"train/radial", "eval/radial"}:
            rel = 2e-2 if name == flow_evaluation.KID else 2e-3  # a difference of means
            assert row[name] == pytest.approx(other[name], rel=rel), name
    # The whole autoencoder lies beside the flow although only its decoder was used.
    frozen = {path.name.split("-")[0] for path in (tmp_path / "cached" / "frozen").iterdir()}
    assert frozen == {"stem", "vit", "decoder"}


def test_a_run_on_the_cache_without_kid_keeps_no_encoder_on_its_devices(
    root, tmp_path, monkeypatch
):
    placed = []
    replicate = sharding.replicate
    monkeypatch.setattr(
        sharding, "replicate", lambda tree, mesh: placed.extend(tree) or replicate(tree, mesh)
    )
    config = precision.resolve_config(flow_of(root, **{"eval.samples": 0}))
    task = flow_task.prepare(config, tmp_path, sharding.make_mesh())
    assert not {"stem", "vit"} & set(placed)
    assert set(task.record["frozen"]) == {"stem", "vit", "decoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 64, "model.dit.input_size": 4}, "--config.data.image_size=32"),
        ({"data.source": "photos/72"}, "--config.data.source=folder:"),
        ({"model.dit.num_classes": 2}, "--config.model.dit.num_classes=1"),
        pytest.param(
            {"init_from": "", "random_frozen_ok": ("stem", "vit", "decoder"), "seed": 5},
            "made by another stem",
            marks=pytest.mark.slow,
        ),
        (
            {"model.vit.embed_dim": 64, "model.dit.in_channels": 64},
            "with width 64; got .* with width 32",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        stages.run_stage(flow_of(root, **changes), tmp_path / "flow")
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_refused(root, tmp_path):
    encode.run(config_of(root), tmp_path / "cache")
    next((tmp_path / "cache" / "eval").glob("*.array_record")).unlink()
    config = flow_of(root, **{"data.latents": str(tmp_path / "cache")})
    with pytest.raises(ValueError, match="missing or has not"):
        stages.run_stage(config, tmp_path / "flow")


def test_a_signal_keeps_finished_shards(root, tmp_path, monkeypatch):
    finished = []
    write = latent_writer.ShardWriter.write

    def stopping(writer, number, encoded):
        if finished:
            raise KeyboardInterrupt
        write(writer, number, encoded)
        finished.append(number)

    monkeypatch.setattr(latent_writer.ShardWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode.run(config_of(root), tmp_path)
    monkeypatch.setattr(latent_writer.ShardWriter, "write", write)
    plan = json.loads((tmp_path / "train" / "plan.json").read_text())
    assert latent_writer.missing_shards(tmp_path / "train", plan) == [1]
    encode.run(config_of(root), tmp_path)
    assert (tmp_path / "eval" / "manifest.json").exists()
