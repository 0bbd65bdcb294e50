"""Good artefacts with changed bytes: a loader reads them or refuses in one line, nothing else.

A few hundred cases in the suite. In the environment DINOSAE_MUTATIONS=80000 sets the number of
cases per loader (a million in all) and DINOSAE_SEED draws others; a failure names its case.
"""

import collections
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest

from dinosae_jax import config
from dinosae_jax.data import adm_npz, sources
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.eval import adm_moments, frechet
from dinosae_jax.eval.adm_moments import ADM_RECIPE
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import untrusted
from dinosae_jax.weights import conversion, weight_source
from tests.hostile import test_artefacts
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_legacy import write_legacy
from tests.weights_conversion.torch_zip import central_headers, crc, write_torch
from weights_conversion import export
from weights_conversion.readers import containers, formats, inputs
from weights_conversion.readers.stored import StoredTensor
from weights_conversion.tables import KINDS, plan, roots

CASES = int(os.environ.get("DINOSAE_MUTATIONS", "150"))
SEED = int(os.environ.get("DINOSAE_SEED", "0"))
SECONDS = 10  # for one case
RNG = np.random.default_rng(0)
STATE = {
    "cls_token": RNG.standard_normal((1, 1, 64)).astype(np.float32),
    "blocks.0.attn.qkv.weight": RNG.standard_normal((192, 64)).astype(np.float16),
    "blocks.1.ls1.gamma": np.ones(64, np.float32),
    "norm.weight": np.ones(64, np.float32),
}
COUNTS: collections.Counter[str] = collections.Counter()
NUMBER = 0  # of the case that runs


def cases(count=CASES):
    """A source of random numbers for each case."""
    global NUMBER
    for NUMBER in range(count):
        yield random.Random(f"{SEED} {NUMBER}")


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
        COUNTS[f"{loader} refused"] += 1
        one_line = str(error) and "\n" not in str(error)
        assert one_line or type(error).__name__ == "MismatchError", f"{case_name(loader)}: {error}"
    except BaseException as error:
        error.add_note(case_name(loader))
        raise
    finally:
        signal.alarm(0)


def case_name(loader):
    return f"{loader}: case {NUMBER} of DINOSAE_SEED={SEED}"


def edited(data, draw):
    """Bytes after one to four changes at random places."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, new = draw.randrange(len(data) or 1), draw.randbytes(draw.randint(1, 8))
        match draw.randrange(5):
            case 0:
                data[at : at + len(new)] = new
            case 1:
                data[at:at] = new
            case 2:
                del data[at : at + len(new)]
            case 3:
                data[at:at] = data[at : at + 64]
            case 4:
                del data[at:]
    return bytes(data)


CHARACTERS = (*range(128), 0xE9, 0x2028, 0xFFFF, 0x1F600, 0x10FFFF)


def any_text(draw, longest=8):
    return "".join(map(chr, draw.choices(CHARACTERS, k=draw.randint(0, longest))))


def any_json(draw, depth=2):
    """A JSON value, nested at most `depth` deep."""
    match draw.randrange(7 if depth else 5):
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2:
            return draw.randint(-(2 ** draw.randint(0, 70)), 2 ** draw.randint(0, 70))
        case 3:
            return draw.choice([0.0, -0.5, 1e300, float("inf"), float("nan"), draw.random()])
        case 4:
            return any_text(draw)
        case 5:
            return [any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))]
        case _:
            return {any_text(draw): any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))}


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


VALUE = {"model": collections.OrderedDict(STATE), "epoch": (1, [2])}


def test_torch_files(place):
    path = write_torch(place / "a.pth", VALUE)
    data = path.read_bytes()
    start = data.find(b"\x80\x02")
    length = data.find(b"PK\x03\x04", start) - start
    for draw in cases():
        changed = edited(data, draw)
        if draw.random() < 0.5:  # in the pickle, of the same length and with its checksum
            stream = edited(data[start : start + length], draw)[:length].ljust(length, b".")
            changed = bytearray(data[:start] + stream + data[start + length :])
            header = central_headers(bytes(changed))[0]
            changed[header + 16 : header + 20] = crc(stream)
        path.write_bytes(changed)
        on_time("pth", functools.partial(read_weights, path, len(changed)))


@pytest.mark.parametrize("python_2", [False, True])
def test_legacy_torch_files(place, python_2):
    path = write_legacy(place / "a.pth", VALUE, python_2=python_2)
    data = path.read_bytes()
    for draw in cases(CASES // 2):
        changed = edited(data, draw)
        path.write_bytes(changed)
        on_time("legacy pth", functools.partial(read_weights, path, len(changed)))


def test_safetensors_files(place):
    path = save(place / "a.safetensors", STATE)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for draw in cases():
        changed = edited(data, draw)
        if draw.random() < 0.5:
            header = edited(data[8 : 8 + length], draw)
            changed = len(header).to_bytes(8, "little") + header + data[8 + length :]
        path.write_bytes(changed)
        on_time("safetensors", functools.partial(read_weights, path, len(changed)))


def test_safetensors_headers(place):
    path = place / "a.safetensors"
    for draw in cases():
        few = [0, 1, 4, 8, 2**62, draw.randint(-(2**70), 2**70)]
        numbers = draw.choices(few, k=draw.randint(0, 6))
        entry = {"dtype": draw.choice(["F32", "F64", "BOOL", "X", None])}
        entry |= {"shape": numbers[:-2], "data_offsets": numbers[-2:]}
        header = {"norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        header[any_text(draw, 20)] = entry
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
        on_time("safetensors header", functools.partial(read_weights, path, len(text) + 20))


def test_any_file(place):
    path = place / "a"
    for draw in cases():
        data = draw.randbytes(draw.randint(0, 600))
        if draw.random() < 0.5:
            data = b"PK\x03\x04" + data[:30]
        path.write_bytes(data)
        on_time("any file", functools.partial(read_weights, path, len(data)))


NAMES = (
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
)
SIZES = (0, 1, 2, 3, 64, 2**20, 2**40)


def test_tables():
    for draw in cases():
        kind = draw.choice(sorted(KINDS))
        shapes = {
            draw.choice(NAMES).format(draw.choice([*range(13), 10**9])): tuple(
                draw.choices(SIZES, k=draw.randint(0, 5))
            )
            for _ in range(draw.randint(0, 8))
        }

        def case(kind=kind, shapes=shapes):
            roots.prefixes(kind, shapes)
            plan(kind, shapes)

        on_time("tables", case)


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


WRONG = ("../x", "/etc/passwd", "a\nb", 2**70, -1, [], {}, "", 10**12)


def changed(record, draw):
    """The bytes of a JSON record with one value replaced, or with changed bytes."""
    if draw.random() < 0.5:
        return edited(json.dumps(record).encode(), draw)
    value = any_json(draw) if draw.random() < 0.5 else draw.choice(WRONG)
    path = draw.choice(list(places_in(record)))
    return json.dumps(with_value(record, path, value)).encode()


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


def test_records_of_conversions(good, tmp_path):
    folder = shutil.copytree(good / "conversion", tmp_path / "sent")
    record = json.loads((good / "conversion" / "conversion.json").read_text())
    del record["tensors"][3:]

    def case():
        metadata = conversion.read_metadata(folder)
        for entry in metadata["tensors"]:
            export._entry(entry)

    for draw in cases():
        (folder / "conversion.json").write_bytes(changed(record, draw))
        on_time("conversion.json", case)


def test_files_of_conversions(good, tmp_path):
    folder = tmp_path / "sent"
    for draw in cases(max(CASES // 100, 10)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good / "conversion", folder)
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.write_bytes(edited(path.read_bytes(), draw))
        on_time("conversion", lambda: conversion.load(folder))


def test_exports(good, tmp_path):
    folder = shutil.copytree(good / "export", tmp_path / "sent")
    record = json.loads((good / "export" / "export.json").read_text())

    def case():
        source = weight_source.open_weights(folder)
        wanted = {"vit": {"embed_dim": 3, "widths": [1, 2]}}
        ours = LatentConvention(4, 3, 1.0)
        weight_source.check_agreement(source, wanted, ours, tuple(source.variables))

    for draw in cases():
        (folder / "export.json").write_bytes(changed(record, draw))
        on_time("export", case)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_image_archives(place, method):
    members = {
        "arr_0.npy": test_artefacts.IMAGES,
        **{f"{name}.npy": data for name, data in test_artefacts.MOMENTS.items()},
    }
    path = test_artefacts.npz(place / "a.npz", members, method)
    data = path.read_bytes()

    def images():
        for _ in adm_npz.open_archive(path).batches(64):
            pass

    for draw in cases(CASES // 2):
        path.write_bytes(edited(data, draw))
        on_time("npz images", images)
        on_time("npz moments", lambda: adm_moments.read_moments(path, "pool3"))


def test_statistics(place):
    path = place / "a.npz"
    moments = frechet.Statistics(9, np.zeros(3), np.eye(3), ADM_RECIPE)
    frechet.write_statistics(path, moments)
    data = path.read_bytes()
    for draw in cases():
        path.write_bytes(edited(data, draw))
        on_time("statistics", lambda: frechet.read_statistics(path))


def test_manifests(place):
    manifest = {
        "shards": [test_artefacts.shard()],
        "label_names": ["a"],
        **test_artefacts.CACHE,
        "images": test_artefacts.RECIPE,
    }
    (place / "train").mkdir()
    config = {**test_artefacts.RECIPE, "latents": str(place), "flip": False}
    for draw in cases():
        text = changed(manifest, draw)
        (place / "manifest.json").write_bytes(text)
        (place / "train" / "manifest.json").write_bytes(text)
        on_time("archive", lambda: sources._open_archive(place, "train"))
        on_time("cache", lambda: latent_reader.open_latents(config, "train"))


def test_indices_of_shards(place):
    save(place / "model-00001-of-00001.safetensors", STATE)
    index = {"metadata": {}, "weight_map": dict.fromkeys(STATE, "model-00001-of-00001.safetensors")}
    for draw in cases():
        (place / "model.safetensors.index.json").write_bytes(changed(index, draw))
        on_time("index", lambda: read_weights(place, 10**6))


@pytest.mark.parametrize("name", [",", "(", "f4,f4", "[1]", "", None, 3, "x" * 99])
def test_a_data_type_has_a_name(name):
    """What is no name numpy would evaluate; of a million mutations one was a syntax error."""
    with pytest.raises(ValueError, match="a data type has a name such as float32; got"):
        untrusted.dtype(name)
    entry = {"key": "a", "target": "vit/a", "shape": [1], "index": None, "part": [0, 1]}
    assert export._entry(entry | {"dtype": "float32"}).dtype == "float32"
    with pytest.raises(ValueError, match="says where each tensor went; got the tensor"):
        export._entry(entry | {"dtype": name})


def test_a_field_with_letters_of_several_lines_is_told_in_one():
    (line,) = config.differences({"a\nb": 1}, {}, "model.vit.")
    assert line == "model.vit.a?b: 1 here, None there"


def test_the_number_of_cases_is_told(capsys):
    with capsys.disabled():
        print(f"\n{sum(COUNTS.values())} mutated artefacts: {dict(sorted(COUNTS.items()))}")
    assert COUNTS or CASES == 0
