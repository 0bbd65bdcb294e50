"""Weights as people have them: wrapped, sharded, renamed, beside others, under any file name."""

import collections
import functools
import json
import pathlib
import re
import shutil
import tempfile

import numpy as np
import pytest

from dinosae_jax.weights import conversion
from tests.weights_conversion import layouts
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_legacy import write_legacy
from tests.weights_conversion.torch_zip import write_torch
from weights_conversion import convert, export
from weights_conversion.readers import containers, formats, inputs
from weights_conversion.readers.safetensors_file import read_safetensors
from weights_conversion.readers.stored import RefusedFileError

FOLDER = pathlib.Path(__file__).parents[1] / "recordings"
FACEBOOK = {key: np.asarray(value) for key, value in layouts.facebook(FOLDER)[0].items()}
NEWER = layouts.hugging_face(FACEBOOK, newer=True)
OFFICIAL = layouts.read_golden(FOLDER / "autoencoder" / "e_autoencoder.safetensors").weights
MORE_NAMES = ["blob", "a.PT", "a.index.json", "a.tar"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
WORDS = sorted(containers.INSERTED)


def converted(folder, given, kind="dinov3", **options):
    """The metadata of a conversion and its parameters."""
    given = given if isinstance(given, list) else [given]
    metadata = convert.convert_file(kind, given, folder / "out", **options)
    return metadata, conversion.load(folder / "out").params


def assert_same(found, expected):
    """Two trees of parameters have the same leaves, bitwise."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            np.testing.assert_array_equal(found[key], value)


@functools.cache
def plain():
    """The parameters of facebook's plain file."""
    with tempfile.TemporaryDirectory() as folder:
        source = save(pathlib.Path(folder) / "plain.safetensors", FACEBOOK)
        return converted(pathlib.Path(folder), source)[1]


def assert_plain(folder, given, **options):
    """The files convert to what facebook's plain file converts to."""
    metadata, found = converted(folder, given, **options)
    assert_same(found, plain())
    return metadata


def inside_blocks(word):
    return {re.sub(r"^blocks\.(\d+)\.", rf"blocks.\1.{word}.", k): v for k, v in FACEBOOK.items()}


def before_leaves(word):
    return {re.sub(r"\.(\w+)$", rf".{word}.\1", k): v for k, v in FACEBOOK.items()}


@pytest.mark.parametrize(
    ("word", "place"),
    [
        *zip(WORDS, ["inside blocks", "before leaves"] * 3, strict=True),
        *((word, "before all") for word in WORDS[:3]),
        *((word, "twice") for word in WORDS[3:]),
    ],
)
def test_words_that_torch_inserts_belong_to_no_name(tmp_path, word, place):
    state = {
        "inside blocks": lambda: inside_blocks(word),
        "before leaves": lambda: before_leaves(word),
        "before all": lambda: {f"{word}.{key}": value for key, value in FACEBOOK.items()},
        "twice": lambda: {f"module.{word}.{k}": v for k, v in inside_blocks(word).items()},
    }[place]()
    metadata = assert_plain(tmp_path, save(tmp_path / "a.safetensors", state))
    assert all(WORDS_IN.isdisjoint(t["key"].split(".")) for t in metadata["tensors"])
    export.export_directory("dinov3", tmp_path / "out", tmp_path / "back.safetensors")
    back, _ = read_safetensors(tmp_path / "back.safetensors")
    assert list(back) == list(state)
    for key, value in state.items():
        assert np.asarray(back[key]).tobytes() == value.tobytes()


WORDS_IN = set(WORDS)


def test_two_names_that_differ_by_an_inserted_word_are_refused(tmp_path):
    state = {**FACEBOOK, "_orig_mod.norm.weight": FACEBOOK["norm.weight"]}
    with pytest.raises(RefusedFileError, match=r"got norm\.weight and _orig_mod\.norm\.weight"):
        converted(tmp_path, save(tmp_path / "a.safetensors", state))


def heads(prefix):
    return {f"{prefix}.{i}.weight": np.ones((2, 2), np.float32) for i in range(3)}


def below(prefix, state=None):
    return {prefix + key: value for key, value in (state or FACEBOOK).items()}


@pytest.mark.parametrize(
    ("saved", "prefix", "left"),
    [
        (
            {"teacher": {**below("backbone."), **heads("dino_head"), **heads("ibot_head")}},
            "teacher.backbone.",
            ["dino_head.* (3 tensors)", "ibot_head.* (3 tensors)"],
        ),
        (
            {"teacher": {**below("module.backbone."), **heads("module.dino_head")}, "epoch": 3},
            "teacher.module.backbone.",
            ["epoch", "dino_head.* (3 tensors)"],
        ),
        (
            {"teacher": below("backbone."), "dino_loss": {"center": np.ones((1, 4), np.float32)}},
            "teacher.backbone.",
            ["dino_loss (state dict)"],
        ),
        (
            {"model": {"student": heads("head"), "teacher": below("backbone.")}},
            "model.teacher.backbone.",
            ["model.student (state dict)"],
        ),
        (
            {"ema": {"decay": np.ones(1, np.float32), "shadow": dict(FACEBOOK)}},
            "ema.shadow.",
            [],
        ),
        (
            {"state_dict": {**below("net.vit."), **heads("net.loss"), **heads("critic")}},
            "state_dict.net.vit.",
            ["net.* (3 tensors)", "critic.* (3 tensors)"],
        ),
        (
            {**below("dinov3_vit."), **heads("classifier")},
            "dinov3_vit.",
            ["classifier.* (3 tensors)"],
        ),
        ({"model": below("model.")}, "model.model.", []),
    ],
)
def test_a_backbone_beside_heads_is_found(tmp_path, saved, prefix, left):
    metadata = assert_plain(tmp_path, write_torch(tmp_path / "a.pth", saved))
    assert metadata["files"][0]["container"] == prefix
    assert metadata["files"][0]["left"] == left


def test_of_several_networks_one_is_named(tmp_path):
    other = {key: value + 1 for key, value in FACEBOOK.items()}
    flat = save(
        tmp_path / "a.safetensors",
        {**below("module.student.backbone.", other), **below("module.teacher.backbone.")},
    )
    with pytest.raises(
        RefusedFileError, match=r"below student\.backbone, teacher\.backbone"
    ) as error:
        converted(tmp_path, flat)
    assert "--container=student.backbone" in str(error.value)
    assert_plain(tmp_path, flat, container="teacher.backbone")
    nested = write_torch(tmp_path / "b.pth", {"student": other, "teacher": dict(FACEBOOK)})
    with pytest.raises(RefusedFileError, match="student, teacher; name one with --container"):
        converted(tmp_path, nested)
    assert_plain(tmp_path, nested, container="teacher")
    with pytest.raises(RefusedFileError, match=r"no container 'critic', it has 'student', 'teach"):
        converted(tmp_path, nested, container="critic")


def test_a_flat_file_of_containers_prefers_the_moving_average(tmp_path):
    other = {key: value + 1 for key, value in FACEBOOK.items()}
    state = {**below("model.", other), **below("ema.module.")}
    metadata = assert_plain(tmp_path, save(tmp_path / "a.safetensors", state))
    assert metadata["files"][0]["container"] == "ema.module."
    assert metadata["files"][0]["left"] == ["model.* (38 tensors)"]


def test_the_autoencoder_is_found_beside_its_critic(tmp_path):
    state = {"generator." + k: v for k, v in OFFICIAL.items()} | heads("discriminator.heads")
    metadata = converted(tmp_path, save(tmp_path / "a.safetensors", state), "dinosae")[0]
    assert metadata["files"][0]["container"] == "generator."


def shards(folder, state=None, count=3, stem="model", prefix=""):
    """A sharded file as Hugging Face lays it down: neither order nor sizes are even."""
    state = {prefix + key: value for key, value in (state or NEWER).items()}
    emb = [k for k in state if "embeddings." in k]
    layers = [k for k in state if ".layer." in k or k.startswith("layer.")]
    rest = [k for k in state if k not in emb and k not in layers]
    groups = [emb + layers[: len(layers) // 2], layers[len(layers) // 2 :], rest]
    files, where = [], {}
    folder.mkdir(exist_ok=True)
    for i, keys in enumerate(groups, 1):
        path = folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        files.append(save(path, {key: state[key] for key in keys}))
        where |= {key: path.name for key in keys}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return files, index


@pytest.mark.parametrize(
    ("order", "prefix", "newer"),
    [
        ("ascending", "", True),
        ("descending", "", True),
        ("index", "", True),
        ("folder", "", True),
        ("no index", "vit.", True),
        ("descending", "model.", True),
        ("index", "model.module.", False),
        ("descending", "", False),
    ],
)
def test_shards_convert_like_the_whole_file(tmp_path, order, prefix, newer):
    state = layouts.hugging_face(FACEBOOK, newer=newer)
    whole = converted(tmp_path, save(tmp_path / "whole.safetensors", state))[1]
    files, index = shards(tmp_path / "sharded", state, prefix=prefix)
    if order == "no index":
        index.unlink()
    given = {"ascending": files, "descending": files[::-1], "index": index}.get(order, index.parent)
    metadata, found = converted(tmp_path, given)
    assert_same(found, whole)
    assert len(metadata["files"]) == 3
    export.export_directory("dinov3", tmp_path / "out", tmp_path / "back.safetensors")
    back, _ = read_safetensors(tmp_path / "back.safetensors")
    assert {key: np.asarray(value).tobytes() for key, value in back.items()} == {
        prefix + key: value.tobytes() for key, value in state.items()
    }


def test_parts_of_a_sharded_model_are_refused(tmp_path):
    files, index = shards(tmp_path / "sharded")
    with pytest.raises(
        RefusedFileError, match=r"all of its 3 shards; got 1 of model; give the fol"
    ):
        converted(tmp_path, files[1])
    files[1].unlink()
    with pytest.raises(
        RefusedFileError, match=r"got none called model-00002-of-00003\.safetensors"
    ):
        converted(tmp_path, index)
    index.unlink()
    with pytest.raises(RefusedFileError, match="got 2 of model"):
        converted(tmp_path, index.parent)


def test_a_folder_of_hugging_faces_cache(tmp_path):
    # models--x/snapshots/HASH/model.safetensors is a link to models--x/blobs/SHA256.
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "ab"
    files, index = shards(tmp_path / "sharded")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate([*files, index]):
        shutil.move(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    metadata = converted(tmp_path, snapshot)[0]
    assert metadata["layout"] == "huggingface_model_layer"
    blob = save(tmp_path / "blob.safetensors", FACEBOOK).rename(blobs / "deadbeef")
    assert_plain(tmp_path, blob)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "got .* with no files; name the file"),
        (["config.json", "notes.txt"], "got .* with config.json, notes.txt; name the file"),
        (["a.safetensors", "b.safetensors"], "holds one model; got .* with a.safetensors, b.safet"),
        (["a.pth", "b.bin"], "holds one model; got .* with a.pth, b.bin; name one of them"),
    ],
)
def test_a_folder_without_one_model_is_refused(tmp_path, names, says):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_bytes(b"x")
    with pytest.raises(RefusedFileError, match=says):
        inputs.find_files([tmp_path / "folder"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "MODEL.SAFETENSORS"])
def test_a_folder_with_one_model_is_enough(tmp_path, name):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "config.json").write_text("{}")
    path = tmp_path / "repository" / name
    if path.suffix == ".bin":
        write_torch(path, collections.OrderedDict(FACEBOOK))
        save(path.with_name("b.notes"), FACEBOOK)
    else:
        save(path, FACEBOOK)
    assert_plain(tmp_path, path.parent)


@pytest.mark.parametrize("name", ["A.SAFETENSORS", "a.pth", *map(slow, MORE_NAMES)])
@pytest.mark.parametrize("write", [save, write_torch, write_legacy])
def test_the_format_is_told_by_the_content(tmp_path, name, write):
    path = tmp_path / name
    write(path, collections.OrderedDict(FACEBOOK))
    assert_plain(tmp_path, path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!DOCTYPE html><html>Access denied</html>", "a web page"),
        (b"\n  <html lang=en>", "a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s1--00", "a git-annex pointer"),
        (b"{}", "JSON without a weight_map"),
        (b'{"error": "Repository not found"}', "JSON without a weight_map"),
        (b'  {"a": 1}', "JSON without a weight_map"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "compressed by gzip"),
        (b"BZh91AY", "compressed by bzip2"),
        (b"\xfd7zXZ\x00\x00", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "the pickle is damaged"),
        (b"\x80\x04\x95\x10", "a plain pickle"),
        (bytes(257) + b"ustar  \0", "a tar archive"),
        (b"", "an empty file"),
        (bytes(4000), "nothing but zeros"),
        (b"tiny", "4 bytes"),
        (b"thesis, chapter one", "bytes that begin with b'thesis"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "blob"])
def test_what_holds_no_weights_is_called_by_its_name(tmp_path, data, says, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RefusedFileError, match=re.escape(says)) as error:
        convert.convert_file("dinov3", [tmp_path / name], tmp_path / "out")
    assert "\n" not in str(error.value) and str(error.value).count(";") >= 2


def test_every_published_format_is_recognised(tmp_path):
    path = save(tmp_path / "a", FACEBOOK)
    assert formats.format_of(path) == formats.SAFETENSORS
    assert formats.format_of(write_torch(tmp_path / "b", {})) == formats.TORCH
    assert formats.format_of(write_legacy(tmp_path / "c", {})) == formats.TORCH


@pytest.mark.parametrize(
    "name",
    [
        "dinov3_ft-20260115.pth",
        "ckpt-00050000.pt",
        "a-20260115",
        "a-8AA4CBDD.pth",
        "a_8aa4cbdd.pth",
    ],
)
def test_a_date_or_a_step_in_a_name_is_no_hash(tmp_path, name):
    assert_plain(tmp_path, write_torch(tmp_path / name, collections.OrderedDict(FACEBOOK)))


@pytest.mark.parametrize("name", ["x-8aa4cbdd.pth", "x-0badf00d.pth", "X-8aa4cbdd.PT"])
def test_a_hash_in_a_name_is_compared(tmp_path, name):
    path = write_torch(tmp_path / name, collections.OrderedDict(FACEBOOK))
    with pytest.raises(RefusedFileError, match=f"claims sha256 {name[2:10]}"):
        converted(tmp_path, path)
    # A safetensors file keeps the name of what it was made from.
    assert_plain(tmp_path, save(path, FACEBOOK))


AWKWARD = ["run,2", "a b", "[1]", "a?b*c", "ä{0}", "~x", "100%25", "#1"]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_paths(tmp_path, name, monkeypatch, capsys):
    folder = tmp_path / name
    folder.mkdir()
    source = save(folder / f"{name}.safetensors", FACEBOOK)
    output = folder / "out,[1] ~"
    assert convert.main(["--kind=dinov3", f"--input={source}", f"--output={output}"]) == 0
    back = folder / "back,.safetensors"
    assert export.main(["--kind=dinov3", f"--input={output}", f"--output={back}"]) == 0
    assert set(read_safetensors(back)[0]) == set(FACEBOOK)
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_the_home_folder_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(tmp_path / "a.safetensors", FACEBOOK)
    assert convert.main(["--kind=dinov3", "--input=~/a.safetensors", "--output=~/w"]) == 0
    assert f"wrote {tmp_path / 'w'}" in capsys.readouterr().out
    assert export.main(["--kind=dinov3", "--input=~/w", "--output=~/b.safetensors"]) == 0
    assert (tmp_path / "w" / "conversion.json").exists() and (tmp_path / "b.safetensors").exists()
    assert not list(pathlib.Path().iterdir())
    assert conversion.is_conversion("~/w") and conversion.load("~/w").config
    assert convert.main(["--kind=dinov3", "--input=~nobody-here/a", "--output=~/w"]) == 1
    assert "no such user" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["https://x.org/a.pth", "hf://org/name", "ftp://b/a"])
def test_urls_are_no_paths(tmp_path, url, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "a.safetensors", FACEBOOK)
    assert convert.main(["--kind=dinov3", f"--input={url}", "--output=w"]) == 1
    assert f"in gs:// or s3://; got {url}; copy it" in capsys.readouterr().err
    assert convert.main(["--kind=dinov3", f"--input={source}", f"--output={url}"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}


def test_inputs_may_be_repeated_or_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b,1", "b", "c,d,e"):
        pathlib.Path(name).write_bytes(b"")
    assert inputs.split_list("a,b,1,c,d,e") == ["a", "b,1", "c,d,e"]
    assert inputs.split_list("a,b,a") == ["a", "b", "a"]
    assert inputs.split_list("nothing,a") == ["nothing", "a"]
    files, _ = shards(tmp_path / "sharded")
    repeated = [f"--input={file}" for file in files]
    joined = ["--input=" + ",".join(map(str, files))]
    for flags in (repeated, joined, [*joined[:1]]):
        assert convert.main(["--kind=dinov3", *flags, "--output=out"]) == 0
