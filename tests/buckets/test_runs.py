"""Runs that live in a bucket end as on a disk, and read everything that they name from one."""

import io
import tarfile

import jax
import numpy as np
import pytest
from safetensors import numpy as numpy_safetensors

from configs import encode as encode_config
from configs import export as export_config
from dinosae_jax import Autoencoder
from dinosae_jax.data import archive, sources
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.jobs import encode, export, train
from dinosae_jax.runtime import buckets, files
from dinosae_jax.train import stages
from dinosae_jax.weights import checkpoint, conversion, integrity, weight_source
from tests import tiny
from tests.train import kills
from tests.weights_conversion import layouts
from weights_conversion import convert
from weights_conversion import export as conversion_export

pytestmark = pytest.mark.slow


def test_a_chain_ends_as_on_a_disk(folder, tmp_path):
    for workdir in (tmp_path / "disk", folder):
        train.run(kills.chain(tmp_path / "data"), workdir)
    for name in kills.chain(tmp_path / "data").chain:
        ours, theirs = folder / name, tmp_path / "disk" / name
        assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        states = kills.state_of(ours), kills.state_of(files.path(theirs))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))
    written = {name for name in buckets.listing(folder) if "tensorboard" not in name}
    on_disk = {p.relative_to(tmp_path / "disk").as_posix() for p in (tmp_path / "disk").rglob("*")}
    commits = {name for name in written if name.endswith((integrity.COMMIT, ".lease"))}
    data = {name for name in written if "/d/" in name}
    assert written - commits - data <= on_disk
    assert any("tensorboard" in name for name in buckets.listing(folder))
    loaded = Autoencoder.load(folder / "stage4")
    assert loaded.encode(np.zeros((1, 32, 32, 3), np.float32)).shape[0] == 1


def copy_to(folder, source):
    files.publish_folder(source, folder)
    return folder


def same(one, other):
    assert len(one) == len(other) and one.label_names == other.label_names
    assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]


def test_images_are_read_from_a_bucket(folder, squares, tmp_path):
    here = sources.open_records(f"folder:{squares}", "train")
    copy_to(folder / "tree", squares)
    same(sources.open_records(f"folder:{folder}/tree", "train"), here)

    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(squares / "train", "train")
    buckets.upload(tmp_path / "train.tar", folder / "tars" / "train.tar")
    there = sources.open_records(f"tar:{folder}/tars/*.tar", "train")
    same(there, sources.open_records(f"tar:{tmp_path}/*.tar", "train"))

    archive.convert_images(f"folder:{squares}", str(folder / "archive"), num_shards=2)
    archive.convert_images(f"folder:{squares}", str(tmp_path / "archive"), num_shards=2)
    there = sources.open_records(f"array_record:{folder}/archive", "train")
    same(there, sources.open_records(f"array_record:{tmp_path}/archive", "train"))


def test_a_set_of_tensorflow_datasets_is_copied(folder, tmp_path):
    from dinosae_jax.data import photos

    photos.prepare(tmp_path, "72")
    copy_to(folder / "photos", tmp_path / "photos")
    there = sources.open_records("tfds:photos/72", "train", data_dir=str(folder))
    same(there, sources.open_records("tfds:photos/72", "train", data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="the embedded photos is a path on this machine"):
        photos.prepare(str(folder), "72")


def test_weights_latents_and_exports_live_in_a_bucket(folder, tmp_path):
    there = weight_source.open_weights(tiny.write(tmp_path))
    for name in ("stage", "data"):
        copy_to(folder / name, tmp_path / name)
    files.write_bytes(folder / "stage" / checkpoint.FOLDER / "0" / integrity.COMMIT, b"")
    found = weight_source.open_weights(folder / "stage")
    assert found.sha256 == there.sha256
    assert str(found.path) == f"{folder}/stage/checkpoints/0"
    with pytest.raises(ValueError, match="which does not exist"):
        weight_source.open_weights(folder / "none")

    config = encode_config.get_config("tiny")
    config.init_from, config.num_shards = str(folder / "stage"), 2
    config.data.update(source=f"folder:{folder}/data", image_size=32, flip=True)
    encode.run(config, folder / "latents")
    data = dict(config.data.to_dict(), latents=str(folder / "latents"))
    source = latent_reader.open_latents(data, "train")
    batch = next(latent_reader.train_batches(source, data, batch_size=4, seed=0))
    assert batch["label"].shape == (4,)

    config = export_config.get_config()
    config.init_from = str(folder / "stage")
    export.run(config, folder / "export")
    found = weight_source.open_weights(folder / "export")
    assert str(found.path) == f"{folder}/export" and set(found.variables) >= {"stem", "decoder"}


def test_weights_are_converted_from_a_bucket_into_one(folder, tmp_path, data_dir):
    source = layouts.save(tmp_path / "a.safetensors", layouts.facebook(data_dir)[0])
    buckets.upload(source, folder / "a.safetensors")
    for _ in range(2):  # the second replaces the first
        given = [f"--input={folder}/a.safetensors", f"--output={folder}/w"]
        assert convert.main(["--kind=dinov3", *given]) == 0
    assert conversion.load(folder / "w").config
    given = [f"--input={folder}/w", f"--output={folder}/b.safetensors"]
    assert conversion_export.main(["--kind=dinov3", *given]) == 0
    there = numpy_safetensors.load((folder / "b.safetensors").read_bytes())
    here = numpy_safetensors.load(source.read_bytes())
    jax.tree.map(np.testing.assert_array_equal, there, here)


def test_pictures_are_written_whole(folder):
    from dinosae_jax.data import png

    picture = tiny.images(1, 16, 16)[0]
    png.write_png(folder / "a.png", picture)
    np.testing.assert_array_equal(png.decode_png((folder / "a.png").read_bytes()), picture)
    assert io.BytesIO((folder / "a.png").read_bytes()).read(4) == b"\x89PNG"


def test_a_workdir_of_another_run_is_refused(folder):
    files.write_json(folder / "export.json", {})
    with pytest.raises(ValueError, match=r"which holds an export \(export.json\)"):
        stages.check_kind(folder, is_chain=False)
