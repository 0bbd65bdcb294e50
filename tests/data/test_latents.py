"""The latent cache: rounding, batches by (seed, step), going on, and what is refused."""

import itertools
import json

import numpy as np
import pytest

from dinosae_jax.data import images
from dinosae_jax.data.latents import latent_reader, latent_record, latent_writer
from dinosae_jax.train import flow_step

TOKENS, WIDTH, COUNT = 4, 32, 11
CONFIG = {
    "source": "folder:x",
    "holdout": 0,
    "crop": "center",
    "image_size": 32,
    "flip": True,
    "threads": 2,
}


def tokens_of(index):
    """Two variants of an image's tokens, float32 [2,n,d] of norm about 6."""
    return np.random.default_rng(index).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)


def make_plan(stored="bfloat16", **changes):
    plan = {
        "images": latent_reader.image_recipe(CONFIG),
        "flipped": True,
        "format": stored,
        "tokens": TOKENS,
        "width": WIDTH,
        "label_names": ["a", "b"],
        "count": COUNT,
        "num_shards": 3,
    }
    return plan | changes


def encoded(indices, size=2):
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        variants = np.stack([tokens_of(index) for index in part])
        yield variants, np.array([index % 2 for index in part], np.int32)


def write(folder, plan, numbers=None):
    latent_writer.claim(folder / "train", plan)
    for number in range(plan["num_shards"]) if numbers is None else numbers:
        found = encoded(latent_writer.shard_range(plan, number))
        latent_writer.write_shard(folder / "train", plan, number, found)


@pytest.fixture(params=latent_record.FORMATS)
def stored(request):
    return request.param


@pytest.fixture
def cache(tmp_path, stored):
    plan = make_plan(stored)
    write(tmp_path, plan)
    latent_writer.finish(tmp_path / "train", plan)
    return {**CONFIG, "latents": str(tmp_path)}


def restored(batch):
    """Tokens as the training step sees them."""
    return np.asarray(flow_step.flow_data(STAGE, {}, batch))


STAGE = flow_step.StepSpec(
    None, None, "linear", 1.0, None, "", 1
)  # a Euclidean path leaves them alone


def take(count, source, config, **options):
    return list(
        itertools.islice(latent_reader.train_batches(source, config, seed=3, **options), count)
    )


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_tokens_come_back_within_the_rounding_of_their_format(cache, stored):
    source = latent_reader.open_latents(cache, "train")
    for batch in take(3, source, cache, batch_size=4):
        tokens = restored(batch)
        for row, index in enumerate(batch["index"]):
            assert batch["label"][row] == index % 2
            errors = [np.abs(tokens[row] - variant).max() for variant in tokens_of(index)]
            # The plain or the flipped variant; |z| < 4: half a step is 2^-9 |z|, or max / 254.
            assert min(errors) < (8e-3 if stored == "bfloat16" else 1.6e-2)
            assert max(errors) > 1.0
        norms = np.linalg.norm(tokens, axis=-1)
        wanted = [np.linalg.norm(tokens_of(i), axis=-1) for i in batch["index"]]
        assert np.abs(norms[:, None] / np.stack(wanted) - 1).min(axis=1).max() < 2e-3


@pytest.mark.parametrize(("stored", "degrees"), [("bfloat16", 0.11), ("int8", 0.6)])
def test_angles_at_full_width(stored, degrees):
    tokens = np.random.default_rng(0).standard_normal((16, 1024)).astype(np.float32)
    fields = latent_record.layout(stored, 16, 1024)
    batch = latent_record.empty_batch(fields, 1)
    latent_record.unpack_into(latent_record.pack(tokens, 5, stored), fields, batch, 0)
    assert batch["label"] == 5
    unit, exact = (
        array / np.linalg.norm(array, axis=-1, keepdims=True)
        for array in (restored(batch)[0].astype(np.float64), tokens.astype(np.float64))
    )
    angles = np.rad2deg(2 * np.arcsin(np.linalg.norm(unit - exact, axis=-1) / 2))
    assert degrees / 2 < angles.max() < degrees


def test_images_and_flips_are_those_of_training_on_images(cache):
    """The order and the flips of `images.train_batches`, whose pictures tell which they are."""

    class Pictures:
        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            picture = np.zeros((32, 32, 3), np.uint8)
            picture[0, 0], picture[:, -1] = index, 255
            return {"image": picture, "label": np.int32(index % 2), "index": np.int64(index)}

    config = {**cache, "threads": 0}
    theirs = images.train_batches(Pictures(), config, batch_size=8, seed=3)
    ours = latent_reader.train_batches(
        latent_reader.open_latents(cache, "train"), config, batch_size=8, seed=3
    )
    flips = []
    for batch, other in itertools.islice(zip(ours, theirs, strict=False), 4):
        np.testing.assert_array_equal(batch["index"], other["index"])
        for row, tokens in enumerate(restored(batch)):
            flips.append(other["image"][row, 5, 0, 0] == 255)
            wanted = tokens_of(batch["index"][row])[int(flips[-1])]
            np.testing.assert_allclose(tokens, wanted, atol=2e-2)
    assert 0 < sum(flips) < len(flips)


def test_batches_depend_on_seed_and_step_alone(cache):
    source = latent_reader.open_latents(cache, "train")
    reference = take(5, source, cache, batch_size=8)
    assert_same(take(5, source, {**cache, "threads": 0}, batch_size=8), reference)
    assert_same(take(3, source, cache, batch_size=8, start_step=2), reference[2:])
    for rows in (np.arange(4), np.array([0, 3, 5, 6])):
        part = take(5, source, cache, batch_size=8, rows=rows)
        own = [{name: batch[name][rows] for name in batch} for batch in reference]
        assert_same(part, own)
    seen = np.concatenate([batch["index"] for batch in reference])[:COUNT]
    assert sorted(seen) == list(range(COUNT))


def test_evaluation_is_one_pass_in_order_without_flips(cache):
    source = latent_reader.open_latents(cache, "train")
    batches = list(latent_reader.eval_batches(source, cache, batch_size=8))
    assert [batch["mask"].sum() for batch in batches] == [8, 3]
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, [*range(COUNT), *[-1] * 5])
    for batch in batches:
        for tokens, index in zip(restored(batch), batch["index"], strict=True):
            wanted = tokens_of(index)[0] if index >= 0 else np.zeros((TOKENS, WIDTH))
            np.testing.assert_allclose(tokens, wanted, atol=2e-2)


def test_norm_statistics(cache):
    norms = latent_reader.open_latents(cache, "train").manifest["norms"]
    wanted = np.linalg.norm([tokens_of(index) for index in range(COUNT)], axis=-1)
    assert norms["tokens"] == wanted.size == COUNT * 2 * TOKENS
    assert norms["mean"] == pytest.approx(wanted.mean(), rel=1e-6)
    assert norms["deviation"] == pytest.approx(wanted.std(), rel=1e-4)


def test_writing_goes_on_and_repairs(tmp_path):
    plan, folder = make_plan(), tmp_path / "train"
    write(tmp_path, plan, numbers=[1])
    assert latent_writer.missing_shards(folder, plan) == [0, 2]
    assert latent_writer.missing_shards(folder, plan, 0, 2) == [0, 2]
    assert latent_writer.missing_shards(folder, plan, 1, 2) == []
    with pytest.raises(ValueError, match="lacks number 0"):
        latent_writer.finish(folder, plan)
    with pytest.raises(ValueError, match=r"run configs/encode\.py again"):
        latent_reader.open_latents({**CONFIG, "latents": str(tmp_path)}, "train")
    write(tmp_path, plan, numbers=[0, 2])
    whole = latent_writer.finish(folder, plan)
    assert {path.suffix for path in folder.iterdir()} == {".array_record", ".json"}
    assert len(list(folder.glob("*.json"))) == 1
    damage(folder / latent_writer.shard_name(plan, 2))
    assert latent_writer.missing_shards(folder, plan) == [2]
    write(tmp_path, plan, numbers=[2])
    assert latent_writer.finish(folder, plan) == whole


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_write_the_records_of_one_in_its_order(tmp_path, stored, threads):
    plan = make_plan(stored)
    write(tmp_path / "one", plan)
    latent_writer.claim(tmp_path / "many", plan)
    with latent_writer.ShardWriter(tmp_path / "many", plan, threads) as writer:
        for number in range(plan["num_shards"]):
            writer.write(number, encoded(latent_writer.shard_range(plan, number)))
    names = sorted(path.name for path in (tmp_path / "one" / "train").iterdir())
    assert len(names) == 2 * plan["num_shards"] + 1
    for name in names:
        ours, theirs = (tmp_path / "many" / name, tmp_path / "one" / "train" / name)
        assert ours.read_bytes() == theirs.read_bytes()
    record = latent_record.pack(tokens_of(0)[0], 0, stored)
    assert record in (tmp_path / "many" / latent_writer.shard_name(plan, 0)).read_bytes()


def test_a_shard_that_went_wrong_is_told_at_the_next(tmp_path):
    plan = make_plan()
    latent_writer.claim(tmp_path, plan)
    bad = [(np.full((1, 2, TOKENS, WIDTH), np.inf, np.float32), np.zeros(1, np.int32))]
    with latent_writer.ShardWriter(tmp_path, plan) as writer:
        writer.write(0, bad)
        while not writer._entries[0].done():
            pass
        with pytest.raises(ValueError, match="must be finite"):
            writer.write(1, encoded(latent_writer.shard_range(plan, 1)))
        writer._entries.clear()
    assert not latent_writer._entries(tmp_path, plan)


def damage(path):
    content = bytearray(path.read_bytes())
    content[700] ^= 0xFF  # inside the first records
    path.write_bytes(content)


def test_missing_and_damaged_shards_are_refused_at_the_start(cache, tmp_path, monkeypatch):
    shard = sorted((tmp_path / "train").glob("*.array_record"))[1]
    content = shard.read_bytes()
    damage(shard)
    with pytest.raises(ValueError, match="has changed") as error:
        latent_reader.open_latents(cache, "train")
    assert shard.name in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(latent_reader, "HASHED_BYTES", 0)  # a large cache: found when it is read
    with pytest.raises(
        ValueError, match=r"must be readable; got number .* configs/encode\.py"
    ) as error:
        source = latent_reader.open_latents(cache, "train")
        take(20, source, cache, batch_size=8)
    assert "\n" not in str(error.value)
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="missing or has not"):
        latent_reader.open_latents(cache, "train")
    shard.unlink()
    with pytest.raises(ValueError, match="missing or has not"):
        latent_reader.open_latents(cache, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "folder:y"}, r"--config\.data\.source=folder:x"),
        ({"image_size": 64}, r"--config\.data\.image_size=32"),
        ({"holdout": 5}, r"--config\.data\.holdout=0"),
    ],
)
def test_a_cache_of_other_images_is_refused(tmp_path, changes, message):
    write(tmp_path, make_plan())
    latent_writer.finish(tmp_path / "train", make_plan())
    with pytest.raises(ValueError, match=message) as error:
        latent_reader.open_latents({**CONFIG, "latents": str(tmp_path), **changes}, "train")
    assert "\n" not in str(error.value)


def test_a_cache_of_other_pixels_is_refused(tmp_path, monkeypatch):
    write(tmp_path, make_plan())
    latent_writer.finish(tmp_path / "train", make_plan())
    monkeypatch.setattr(latent_reader.pixels.crops, "FILTER", "another one")
    with pytest.raises(ValueError, match=r"data\.pixels=.*'another one'.*; encode again"):
        latent_reader.open_latents({**CONFIG, "latents": str(tmp_path)}, "train")


def test_the_splits_of_a_cache_have_the_same_classes(tmp_path):
    for split, names in (("train", ["a", "b"]), ("eval", ["b"])):
        plan = make_plan(label_names=names)
        write(tmp_path / split, plan)
        latent_writer.finish(tmp_path / split / "train", plan)
    (tmp_path / "eval" / "train").rename(tmp_path / "train" / "eval")
    config = {**CONFIG, "latents": str(tmp_path / "train"), "flip": False}
    latent_reader.open_latents(config, "train")
    with pytest.raises(ValueError, match=r"got 1 in .*eval and 2 in training"):
        latent_reader.open_latents(config, "eval")


def test_flips_need_a_cache_with_flips(tmp_path):
    plan = make_plan(flipped=False)
    write(tmp_path, plan)
    latent_writer.finish(tmp_path / "train", plan)
    with pytest.raises(ValueError, match=r"--config\.data\.flip=False"):
        latent_reader.open_latents({**CONFIG, "latents": str(tmp_path)}, "train")


def test_a_folder_holds_one_cache(tmp_path):
    write(tmp_path, make_plan(), numbers=[0])
    with pytest.raises(ValueError, match="format bfloat16 instead of int8"):
        latent_writer.claim(tmp_path / "train", make_plan("int8"))
    latent_writer.claim(tmp_path / "train", make_plan())


def test_tokens_that_are_not_finite_are_refused(tmp_path):
    plan = make_plan()
    latent_writer.claim(tmp_path / "train", plan)
    bad = [(np.full((1, 2, TOKENS, WIDTH), np.nan, np.float32), np.zeros(1, np.int32))]
    with pytest.raises(ValueError, match="must be finite"):
        latent_writer.write_shard(tmp_path / "train", plan, 0, bad)
    assert json.loads((tmp_path / "train" / "plan.json").read_text()) == plan


def test_the_number_of_shards_follows_the_size():
    assert latent_writer.shard_count(1_281_167, True, "bfloat16", 256, 1024) == 1252
    assert latent_writer.shard_count(10, True, "int8", 16, 64) == 1
