"""Good artefacts with changed bytes: a loader reads them or refuses in one line, nothing else.

A few hundred cases in the suite; DINOSAE_MUTATIONS=1000000 in the environment sets the number of
cases per loader.
"""

import collections
import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinosae_jax.data import adm_npz, sources
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.eval import adm_moments, frechet
from dinosae_jax.eval.adm_moments import ADM_RECIPE
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.weights import conversion, weight_source
from tests.hostile import test_artefacts
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_legacy import write_legacy
from tests.weights_conversion.torch_zip import central_headers, crc, write_torch
from weights_conversion import export
from weights_conversion.readers import containers, formats, inputs
from weights_conversion.readers.stored import StoredTensor
from weights_conversion.tables import KINDS, plan, roots

CASES = int(os.environ.get("DINOSAE_MUTATIONS", "60"))
SECONDS = 10  # for one case
RNG = np.random.default_rng(0)
STATE = {
    "cls_token": RNG.standard_normal((1, 1, 64)).astype(np.float32),
    "blocks.0.attn.qkv.weight": RNG.standard_normal((192, 64)).astype(np.float16),
    "blocks.1.ls1.gamma": np.ones(64, np.float32),
    "norm.weight": np.ones(64, np.float32),
}
COUNTS: collections.Counter[str] = collections.Counter()


def on_time(loader, case):
    """Runs one case; anything but a ValueError of one line, or a hang, fails the test."""

    def late(*_):
        pytest.fail(f"{loader} took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        case()
        COUNTS[f"{loader} read"] += 1
    except ValueError as error:
        assert str(error)
        assert "\n" not in str(error) or type(error).__name__ == "MismatchError", str(error)
        COUNTS[f"{loader} refused"] += 1
    finally:
        signal.alarm(0)


checked = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES < 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "insert", "delete", "repeat", "cut"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def edited(data, edits):
    """Bytes after some changes."""
    data = bytearray(data)
    for where, how, new in edits:
        at = int(where * max(len(data), 1))
        match how:
            case "set":
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = new
            case "delete":
                del data[at : at + len(new)]
            case "repeat":
                data[at:at] = data[at : at + 64]
            case "cut":
                del data[at:]
    return bytes(data)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No loader may start a process."""

    def run(*_, **__):
        pytest.fail("a loader ran a command")

    for name in ("system", "popen", "execv", "execve", "posix_spawn"):
        monkeypatch.setattr(os, name, run)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def read_weights(path, size):
    """What convert does before it writes; the tensors stay within the file."""
    for kind in ("dinov3", "dcae_decoder"):
        try:
            states = containers.read(inputs.find_files([path]), kind)
        except formats.RefusedFileError as error:
            refusal = error
            continue
        for state in states:
            tensors = [t for t in state.tensors.values() if isinstance(t, StoredTensor)]
            assert sum(np.asarray(tensor).nbytes for tensor in tensors) <= 2 * size
            plan(kind, {k: tuple(t.shape) for k, t in state.tensors.items()})
        return
    raise refusal


@checked
@given(edits=EDITS, in_pickle=st.booleans())
def test_torch_files(place, edits, in_pickle):
    path = write_torch(
        place / "a.pth", {"model": collections.OrderedDict(STATE), "epoch": (1, [2])}
    )
    data = path.read_bytes()
    if in_pickle:  # of the same length and with its checksum, so that the machine sees the change
        start = data.find(b"\x80\x02")
        length = data.find(b"PK\x03\x04", start) - start
        stream = edited(data[start : start + length], edits)[:length].ljust(length, b".")
        changed = bytearray(data[:start] + stream + data[start + length :])
        header = central_headers(bytes(changed))[0]
        changed[header + 16 : header + 20] = crc(stream)
        path.write_bytes(changed)
    else:
        path.write_bytes(edited(data, edits))
    on_time("pth", lambda: read_weights(path, path.stat().st_size))


@checked
@given(edits=EDITS, python_2=st.booleans())
def test_legacy_torch_files(place, edits, python_2):
    value = {"model": collections.OrderedDict(STATE), "epoch": (1, [2])}
    path = write_legacy(place / "a.pth", value, python_2=python_2)
    path.write_bytes(edited(path.read_bytes(), edits))
    on_time("legacy pth", lambda: read_weights(path, path.stat().st_size))


@checked
@given(edits=EDITS, in_header=st.booleans())
def test_safetensors_files(place, edits, in_header):
    path = save(place / "a.safetensors", STATE)
    data = path.read_bytes()
    if in_header:
        length = int.from_bytes(data[:8], "little")
        header = edited(data[8 : 8 + length], edits)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    else:
        path.write_bytes(edited(data, edits))
    on_time("safetensors", lambda: read_weights(path, path.stat().st_size))


@checked
@given(
    numbers=st.lists(st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 4, 8, 2**62])),
    dtype=st.sampled_from(["F32", "F64", "BOOL", "X", None]),
    key=st.text(max_size=20),
)
def test_safetensors_headers(place, numbers, dtype, key):
    shape, offsets = numbers[:-2], numbers[-2:]
    header = {"norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    path = place / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    on_time("safetensors header", lambda: read_weights(path, path.stat().st_size))


@checked
@given(data=st.binary(max_size=600) | st.binary(max_size=30).map(lambda b: b"PK\x03\x04" + b))
def test_any_file(place, data):
    path = place / "a"
    path.write_bytes(data)
    on_time("any file", lambda: read_weights(path, len(data)))


SIZES = st.integers(0, 3) | st.sampled_from([64, 2**20, 2**40])
SHAPES = st.lists(SIZES, max_size=5).map(tuple)
NAMES = st.sampled_from(
    [
        "cls_token",
        "mask_token",
        "pos_embed",
        "blocks.{}.attn.qkv.weight",
        "blocks.{}.mlp.w12.weight",
        "model.layer.{}.attention.q_proj.weight",
        "embeddings.cls_token",
        "decoder.stages.{}.op_list.0.main.conv1.conv.weight",
        "decoder.project_in.conv.weight",
        "dino_model.patch_embed.cnn.{}.conv.weight",
        "x_embedder.proj.weight",
        "s_embedder.proj.weight",
        "final_layer.linear.weight",
        "feat_rope.freqs_cos",
        "heads.{}.1.fn.0.weight_orig",
        "_blocks.{}._depthwise_conv.weight",
        "Mixed_5b.branch1x1.conv.weight",
        "y_embedder.embedding_table.weight",
    ]
)
KEYS = st.builds(str.format, NAMES, st.integers(0, 12) | st.just(10**9))


@checked
@given(kind=st.sampled_from(sorted(KINDS)), shapes=st.dictionaries(KEYS, SHAPES, max_size=8))
def test_tables(kind, shapes):
    def case():
        roots.prefixes(kind, shapes)
        plan(kind, shapes)

    on_time("tables", case)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def places_in(tree, path=()):
    """Paths to everything in a JSON tree."""
    yield path
    items = tree.items() if isinstance(tree, dict) else ()
    for key, value in enumerate(tree) if isinstance(tree, list) else items:
        yield from places_in(value, (*path, key))


def with_value(tree, path, value):
    """A copy of a JSON tree with one place changed; at the root the value itself."""
    if not path:
        return value
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


def changed(record, where, value):
    paths = list(places_in(record))
    return with_value(record, paths[int(where * len(paths))], value)


WHERE = st.floats(0, 1, exclude_max=True)
VALUES = JSON | st.sampled_from(["../x", "/etc/passwd", "a\nb", 2**70, -1, [], {}, "", 10**12])


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A conversion and an export, each with its record."""
    folder = tmp_path_factory.mktemp("good")
    test_artefacts.convert.convert_file(
        "dinov3", [save(folder / "a.safetensors", test_artefacts.FACEBOOK)], folder / "conversion"
    )
    arrays = {"vit": {"params": {"a": np.ones((2, 3), np.float32)}}}
    convention = LatentConvention(4, 3, 1.0).to_dict()
    model = {"vit": {"embed_dim": 3, "widths": [1, 2]}}
    source = weight_source.WeightSource(arrays, model, convention, ["n"], pathlib.Path("run"))
    weight_source.export(source, folder / "export", ("vit",))
    return folder


@checked
@given(where=WHERE, value=VALUES, edits=st.none() | EDITS)
def test_records_of_conversions(good, tmp_path, where, value, edits):
    folder = tmp_path / "sent"
    if not folder.exists():
        shutil.copytree(good / "conversion", folder)
    text = (good / "conversion" / "conversion.json").read_text()
    record = json.loads(text)
    del record["tensors"][3:]
    new = json.dumps(changed(record, where, value)).encode()
    (folder / "conversion.json").write_bytes(edited(text.encode(), edits) if edits else new)

    def case():
        metadata = conversion.read_metadata(folder)
        for entry in metadata["tensors"]:
            export._entry(entry)

    on_time("conversion.json", case)


@settings(checked, max_examples=max(CASES // 10, 10))
@given(which=WHERE, edits=EDITS)
def test_files_of_conversions(good, tmp_path, which, edits):
    folder = tmp_path / "sent"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good / "conversion", folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[int(which * len(files))]
    path.write_bytes(edited(path.read_bytes(), edits))
    on_time("conversion", lambda: conversion.load(folder))


@checked
@given(where=WHERE, value=VALUES, edits=st.none() | EDITS)
def test_exports(good, tmp_path, where, value, edits):
    folder = tmp_path / "sent"
    if not folder.exists():
        shutil.copytree(good / "export", folder)
    text = (good / "export" / "export.json").read_text()
    new = json.dumps(changed(json.loads(text), where, value)).encode()
    (folder / "export.json").write_bytes(edited(text.encode(), edits) if edits else new)

    def case():
        source = weight_source.open_weights(folder)
        wanted = {"vit": {"embed_dim": 3, "widths": [1, 2]}}
        ours = LatentConvention(4, 3, 1.0)
        weight_source.check_agreement(source, wanted, ours, tuple(source.variables))

    on_time("export", case)


@checked
@given(edits=EDITS, deflated=st.booleans())
def test_image_archives(place, edits, deflated):
    members = {
        "arr_0.npy": test_artefacts.IMAGES,
        **{f"{name}.npy": data for name, data in test_artefacts.MOMENTS.items()},
    }
    path = test_artefacts.npz(place / "a.npz", members, 8 if deflated else 0)
    path.write_bytes(edited(path.read_bytes(), edits))

    def images():
        for _ in adm_npz.open_archive(path).batches(64):
            pass

    on_time("npz images", images)
    on_time("npz moments", lambda: adm_moments.read_moments(path, "pool3"))


@checked
@given(edits=EDITS)
def test_statistics(place, edits):
    path = place / "a.npz"
    moments = frechet.Statistics(9, np.zeros(3), np.eye(3), ADM_RECIPE)
    frechet.write_statistics(path, moments)
    path.write_bytes(edited(path.read_bytes(), edits))
    on_time("statistics", lambda: frechet.read_statistics(path))


@checked
@given(where=WHERE, value=VALUES, edits=st.none() | EDITS)
def test_manifests(place, where, value, edits):
    manifest = {
        "shards": [test_artefacts.shard()],
        "label_names": ["a"],
        **test_artefacts.CACHE,
        "images": test_artefacts.RECIPE,
    }
    (place / "train").mkdir(exist_ok=True)
    new = json.dumps(changed(manifest, where, value)).encode()
    text = edited(json.dumps(manifest).encode(), edits) if edits else new
    (place / "manifest.json").write_bytes(text)
    (place / "train" / "manifest.json").write_bytes(text)
    config = {**test_artefacts.RECIPE, "latents": str(place), "flip": False}
    on_time("archive", lambda: sources._open_archive(place, "train"))
    on_time("cache", lambda: latent_reader.open_latents(config, "train"))


@checked
@given(where=WHERE, value=VALUES, edits=st.none() | EDITS)
def test_indices_of_shards(place, where, value, edits):
    save(place / "model-00001-of-00001.safetensors", STATE)
    index = {"metadata": {}, "weight_map": dict.fromkeys(STATE, "model-00001-of-00001.safetensors")}
    new = json.dumps(changed(index, where, value)).encode()
    text = edited(json.dumps(index).encode(), edits) if edits else new
    (place / "model.safetensors.index.json").write_bytes(text)
    on_time("index", lambda: read_weights(place, 10**6))


def test_the_number_of_cases_is_told(capsys):
    with capsys.disabled():
        print(f"\n{sum(COUNTS.values())} mutated artefacts: {dict(sorted(COUNTS.items()))}")
    assert COUNTS or CASES == 0
