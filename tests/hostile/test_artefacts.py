"""Artefacts from strangers: each is refused in one line, runs nothing and stays in its folder.

Every test gives a loader a file or folder that was made to do harm. A loader may raise ValueError
(RefusedFileError is one) with a message without a newline, within seconds, and may not create or
read anything outside; a canary beside the artefact shows both.
"""

import collections
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from dinosae_jax.data import adm_npz, sources
from dinosae_jax.data.latents import latent_reader
from dinosae_jax.eval import adm_moments, frechet
from dinosae_jax.weights import conversion, role_files, weight_source
from tests.weights_conversion import layouts
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_legacy import write_legacy
from tests.weights_conversion.torch_zip import Call, Global, rebuild, storage, write_torch
from weights_conversion import convert, export

FOLDER = pathlib.Path(__file__).parents[1] / "recordings"
FACEBOOK = {key: np.asarray(value) for key, value in layouts.facebook(FOLDER)[0].items()}
SECONDS = 20
MEMORY = 256 << 20


class Gadget:
    """What runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module", autouse=True)
def traced():
    """Memory is traced through all tests.

    Python 3.11 may crash where tracing stops while another thread allocates, such as one that still
    reads a refused checkpoint.
    """
    tracemalloc.start()
    yield
    tracemalloc.stop()


def refused(load, canary):
    """Asserts that a loader refuses in one line, soon, with little memory, running nothing."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load()
    peak = tracemalloc.get_traced_memory()[1] - before
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 1500, message
    assert "xyzzy" not in message
    assert time.monotonic() - start < SECONDS and peak < MEMORY, (peak, message)
    assert not (canary / "ran").exists()
    assert sorted(path.name for path in canary.iterdir()) == ["secret.txt"]


@pytest.fixture
def canary(tmp_path):
    folder = tmp_path / "canary"
    folder.mkdir()
    (folder / "secret.txt").write_text("xyzzy!")
    return folder


# Weights: one file or folder for convert.


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pickled(path, data):
    return write_torch(path, {}, pickle=data)


def index(folder, where):
    folder.mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(where if isinstance(where, str) else json.dumps({"weight_map": where}))
    return path


def linked_shard(folder, canary):
    path = index(folder, {"a": "model-00001-of-00001.safetensors"})
    save(canary / "inside.safetensors", FACEBOOK)
    moved = (canary / "inside.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model-00001-of-00001.safetensors").symlink_to(moved)
    return path


def linked_folder(folder, canary):
    path = linked_shard(folder, canary)
    path.unlink()
    return folder


FLOATS = {"0": np.zeros(4096, np.float32)}
WINDOW = Global("torch._utils _rebuild_tensor_v2")


def huge_stride(path):
    value = {"w": rebuild(storage("0", "FloatStorage", 4096), 0, (2**40, 4), (0, 1))}
    return write_torch(path, value, FLOATS)


def overlapping(path):
    store = storage("0", "FloatStorage", 4096)
    value = {str(i): rebuild(store, i, (4000,), (1,)) for i in range(90)}
    return write_torch(path, value, FLOATS)


def deflated(path):
    return write_torch(path, {"w": np.zeros(1 << 22, np.float32)}, method=zipfile.ZIP_DEFLATED)


def many_items():
    items = b"](](X\x01\x00\x00\x00aNeq\x00" + b"h\x00" * 10**4 + b"e\x85q\x01"
    calls = b"ccollections\nOrderedDict\nq\x02h\x01R" + b"h\x02h\x01R" * 10**4
    return b"\x80\x02(" + items + calls + b"t."


def nested_tuples(depth):
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * depth


def block(number):
    state = dict(FACEBOOK)
    state[f"blocks.{number}.norm1.weight"] = state["blocks.0.norm1.weight"]
    return state


def sizes_without_bytes():
    state = {key: np.zeros((0, *value.shape[1:]), np.float32) for key, value in FACEBOOK.items()}
    return {**state, "cls_token": np.zeros((1, 0, 1 << 40), np.float32)}


WEIGHTS = {
    "safetensors_header_of_2**63": lambda p, c: header_file(p, b"{}", length=2**63),
    "safetensors_header_longer_than_file": lambda p, c: header_file(p, b"{}", length=10**7),
    "safetensors_shape_of_2**60": lambda p, c: header_file(
        p, {"a": entry([2**60], 0, 8)}, bytes(8)
    ),
    "safetensors_zero_times_2**70": lambda p, c: header_file(p, {"a": entry([0, 2**70], 0, 0)}),
    "safetensors_negative_offsets": lambda p, c: header_file(p, {"a": entry([1], -4, 0)}, bytes(8)),
    "safetensors_overlap": lambda p, c: header_file(
        p, {"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)
    ),
    "safetensors_gap": lambda p, c: header_file(
        p, {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)
    ),
    "safetensors_float_sizes": lambda p, c: header_file(p, {"a": entry([1.0], 0, 4)}, bytes(4)),
    "safetensors_17_axes": lambda p, c: header_file(p, {"a": entry([1] * 17, 0, 4)}, bytes(4)),
    "safetensors_deep_json": lambda p, c: header_file(p, b'{"a":' + b"[" * 10**6),
    "safetensors_long_number": lambda p, c: header_file(p, b'{"a":' + b"9" * 10**5 + b"}"),
    "safetensors_not_utf8": lambda p, c: header_file(p, b'{"\xff\xfe":1}'),
    "safetensors_newline_in_key": lambda p, c: header_file(
        p, {"a\nerror: fine": entry([1], 0, 4)}, bytes(4)
    ),
    "safetensors_terminal_codes_in_key": lambda p, c: header_file(
        p, {"\x1b[2Jblocks": entry([1], 0, 4)}, bytes(4)
    ),
    "safetensors_long_key": lambda p, c: header_file(p, {"k" * 10**6: entry([1], 0, 4)}, bytes(4)),
    "safetensors_70000_tensors": lambda p, c: header_file(
        p, {f"blocks.0.{i}": entry([0], 0, 0) for i in range(70_000)}
    ),
    "safetensors_block_10**9": lambda p, c: save(p, block(10**9)),
    "safetensors_block_of_900_digits": lambda p, c: save(p, block("9" * 900)),
    "safetensors_sizes_without_bytes": lambda p, c: save(p, sizes_without_bytes()),
    "pth_runs_a_command": lambda p, c: pickled(p, pickle.dumps({"w": Gadget(c / "ran")}, 2)),
    "pth_runs_by_stack_global": lambda p, c: pickled(p, pickle.dumps(Gadget(c / "ran"), 4)),
    "pth_eval": lambda p, c: write_torch(p, Call(Global("builtins eval"), ("1",))),
    "pth_getattr": lambda p, c: write_torch(p, Call(Global("builtins getattr"), ("a", "b"))),
    "pth_torch_load": lambda p, c: write_torch(p, Call(Global("torch load"), ("a",))),
    "pth_numpy_reconstruct": lambda p, c: write_torch(
        p, Global("numpy.core.multiarray _reconstruct")
    ),
    "pth_calls_a_storage": lambda p, c: write_torch(p, Call(Global("torch FloatStorage"), (9,))),
    "pth_build_on_a_tensor": lambda p, c: pickled(p, b"\x80\x02}}b}b(b."),
    "pth_extension_opcode": lambda p, c: pickled(p, b"\x80\x02\x82\x01."),
    "pth_inst_opcode": lambda p, c: pickled(p, b"(ios\nsystem\n."),
    "pth_key_of_2**60_tuples": lambda p, c: pickled(p, nested_tuples(60) + b"}h\x00Ns."),
    "pth_shape_of_2**60_tuples": lambda p, c: pickled(
        p,
        nested_tuples(60) + b"0ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00h\x00h\x00\x89}tR.",
    ),
    "pth_list_in_itself": lambda p, c: pickled(p, b"\x80\x02]q\x00" + b"h\x00a" * 10**5 + b"."),
    "pth_million_opcodes": lambda p, c: pickled(p, b"\x80\x02" + b"N0" * 10**6 + b"N."),
    "pth_truncated_pickle": lambda p, c: pickled(p, b"\x80\x02}q"),
    "pth_huge_stride": lambda p, c: huge_stride(p),
    "pth_overlapping_tensors": lambda p, c: overlapping(p),
    "pth_bomb": lambda p, c: deflated(p),
    "pth_dotdot_member": lambda p, c: write_torch(p, dict(FACEBOOK), extra={"../canary/ran": b"x"}),
    "pth_absolute_member": lambda p, c: write_torch(p, {}, extra={str(c / "ran"): b"x"}),
    "pth_storage_by_dotdot": lambda p, c: write_torch(
        p, {"w": rebuild(storage("../../canary/secret.txt", "ByteStorage", 6), 0, (6,), (1,))}
    ),
    "pth_big_endian": lambda p, c: write_torch(p, dict(FACEBOOK), byteorder=b"big"),
    "legacy_runs_a_command": lambda p, c: write_legacy(
        p, {}, pickle=pickle.dumps({"w": Gadget(c / "ran")}, 2)
    ),
    "legacy_runs_in_its_system": lambda p, c: write_legacy(p, {}, system=Gadget(c / "ran")),
    "legacy_runs_in_its_keys": lambda p, c: write_legacy(p, {}, keys=Gadget(c / "ran")),
    "legacy_huge_string": lambda p, c: write_legacy(p, {}, pickle=b"\x80\x02X\xff\xff\xff\xff"),
    "legacy_storage_of_2**62": lambda p, c: write_legacy(
        p, {"w": rebuild(storage("0", "FloatStorage", 2**62), 0, (1,), (1,))}, FLOATS
    ),
    "legacy_many_items_again_and_again": lambda p, c: write_legacy(p, {}, pickle=many_items()),
    "legacy_storage_twice": lambda p, c: write_legacy(p, {}, FLOATS, keys=["0", "0"]),
    "pth_plain_pickle": lambda p, c: p.write_bytes(pickle.dumps(Gadget(c / "ran"))) and p,
    "index_dotdot": lambda p, c: index(p, {"a": "../canary/secret.txt"}),
    "index_absolute": lambda p, c: index(p, {"a": str(c / "secret.txt")}),
    "index_link": linked_shard,
    "index_names_a_number": lambda p, c: index(p, {"a": 3}),
    "index_deep_json": lambda p, c: index(p, '{"weight_map":' + "[" * 10**6),
    "index_of_itself": lambda p, c: index(p, {"a": "model.safetensors.index.json"}),
    "folder_link": linked_folder,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(tmp_path, canary, name, capsys):
    path = WEIGHTS[name](tmp_path / "given", canary)
    refused(lambda: convert.convert_file("dinov3", [path], tmp_path / "out"), canary)
    assert not (tmp_path / "out").exists()
    assert convert.main(["--kind=dinov3", f"--input={path}", f"--output={tmp_path}/out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


SIZES = {
    "lightningdit": {
        "pos_embed": (1, 10**6, 1),
        "x_embedder.proj.bias": (10**6,),
        "final_layer.linear.bias": (4,),
    },
    "rae_ditdh": {
        "pos_embed": (1, 10**6, 1),
        "s_embedder.proj.bias": (64 * 10**4,),
        "x_embedder.proj.weight": (1024, 4, 1, 1),
        "blocks.5.attn.proj.weight": (1024, 2),
    },
    "dino_discriminator": {
        "heads.999.1.fn.0.weight_orig": (10**5, 1, 1),
        "cls_token": (1, 1, 9**5),
    },
    "dcae_decoder": {"decoder.stages.999.op_list.999.main.conv1.conv.weight": (2, 2, 3, 3)},
}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_would_make_huge_tables(tmp_path, canary, kind):
    state = {key: np.zeros(shape, np.float32) for key, shape in SIZES[kind].items()}
    path = save(tmp_path / "a.safetensors", state)
    refused(lambda: convert.convert_file(kind, [path], tmp_path / "out"), canary)


# Conversions: a folder for load and export.


@pytest.fixture(scope="session")
def good_conversion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    convert.convert_file("dinov3", [save(folder / "a.safetensors", FACEBOOK)], folder / "out")
    return folder / "out"


def changed_record(folder, canary, change):
    path = folder / "conversion.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def replaced_by_link(folder, canary, name):
    elsewhere = folder.parent / "elsewhere"
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def link_inside(folder, canary):
    path = largest(folder / "weights")
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def other_arrays(folder, canary):
    huge = {"vit/params/norm/scale": np.zeros((5, 5), np.float32)}
    record = json.loads((folder / "conversion.json").read_text())
    convert._write(folder, huge, record)


def bomb(folder, canary):
    """A checkpoint whose one array would take a terabyte, of which nothing is stored."""
    import tensorstore as ts

    shutil.rmtree(folder / "weights")
    convert._write(folder, {"vit/params/a": np.ones(3, np.float32)}, {})
    good = good_record(folder)
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{folder}/weights/",
            "path": "vit.params.a/",
        },
        "metadata": {"shape": [1 << 38], "chunks": [1 << 38], "dtype": "<f4"},
    }
    ts.open(spec, create=True, delete_existing=True).result()
    (folder / "conversion.json").write_text(json.dumps(good))


def good_record(folder):
    return {
        "format_version": 1,
        "kind": "dinov3",
        "layout": "facebook",
        "files": [],
        "config": {"vit": {}},
        "tensors": [],
        "empty": {},
    }


def metadata_name(folder, canary):
    path = folder / "weights" / "_METADATA"
    text = path.read_text()
    path.write_text(text.replace("cls_token", "../../../canary/secret.txt"))


def separate_files(folder, canary):
    path = folder / "weights" / "_METADATA"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "use_ocdbt": False}))


def record(**fields):
    return lambda folder, canary: changed_record(folder, canary, lambda r: r.update(fields))


CONVERSIONS = {
    "record_is_a_list": lambda f, c: (f / "conversion.json").write_text("[]"),
    "record_is_deep": lambda f, c: (f / "conversion.json").write_text("[" * 10**6),
    "record_is_large": lambda f, c: (f / "conversion.json").write_text(" " * (1 << 25)),
    "record_is_binary": lambda f, c: (f / "conversion.json").write_bytes(b"\xff\xfe{}"),
    "record_is_a_link": lambda f, c: replaced_by_link(f, c, "conversion.json"),
    "record_version": record(format_version={"a": "\n"}),
    "config_is_text": record(config="vit"),
    "config_role_is_a_path": record(config={"../vit": {}}),
    "empty_of_2**50": record(empty={"vit/params/storage_tokens": [[1, 2**50], "float32"]}),
    "empty_0_times_2**62": record(empty={"vit/a": [[0, 2**62, 2**62], "float32"]}),
    "empty_of_objects": record(empty={"vit/params/a": [[0], "not a type"]}),
    "empty_below_an_array": record(empty={"vit/params/norm/scale/a/b": [[0], "float32"]}),
    "weights_are_a_link": lambda f, c: replaced_by_link(f, c, "weights"),
    "a_file_of_weights_is_a_link": link_inside,
    "weights_are_missing": lambda f, c: shutil.rmtree(f / "weights"),
    "weights_are_truncated": lambda f, c: largest(f / "weights").write_bytes(b"x"),
    "weights_are_others": other_arrays,
    "weights_of_a_terabyte": bomb,
    "array_named_by_a_path": metadata_name,
    "arrays_in_separate_files": separate_files,
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(tmp_path, canary, name, good_conversion):
    folder = shutil.copytree(good_conversion, tmp_path / "sent")
    CONVERSIONS[name](folder, canary)
    refused(lambda: conversion.load(folder), canary)


def first_tensor(**fields):
    def change(record):
        record["tensors"][0] |= fields

    return lambda folder, canary: changed_record(folder, canary, change)


EXPORTS = {
    "target_of_another_role": first_tensor(target="dit/params/a"),
    "target_is_no_leaf": first_tensor(target="vit/params"),
    "target_is_a_number": first_tensor(target=3),
    "index_outside": first_tensor(index=10**9),
    "part_of_zero": first_tensor(part=[0, 0]),
    "part_is_text": first_tensor(part="abc"),
    "shape_of_2**60": first_tensor(shape=[2**60]),
    "shape_is_text": first_tensor(shape="ab"),
    "dtype_of_objects": first_tensor(dtype="O"),
    "another_field": first_tensor(run="os.system"),
    "files_that_disagree": record(files=[]),
    "key_of_many_lines": first_tensor(key="a\nb"),
    "keys_twice": lambda f, c: changed_record(
        f, c, lambda r: r["tensors"][1].update(key=r["tensors"][0]["key"])
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_conversions_for_export(tmp_path, canary, name, good_conversion, capsys):
    folder = shutil.copytree(good_conversion, tmp_path / "sent")
    EXPORTS[name](folder, canary)
    output = tmp_path / "back.safetensors"
    refused(lambda: export.export_directory("dinov3", folder, output), canary)
    assert not output.exists() and not list(tmp_path.glob("*.part"))
    assert export.main(["--kind=dinov3", f"--input={folder}", f"--output={output}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Exports of a run.


@pytest.fixture(scope="session")
def good_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    source = weight_source.WeightSource(
        {"vit": {"params": {"a": np.ones((2, 3), np.float32)}}},
        {"vit": {"embed_dim": 3}},
        {},
        [],
        pathlib.Path("run"),
    )
    weight_source.export(source, folder / "out", ("vit",))
    assert weight_source.open_weights(folder / "out").variables["vit"]["params"]["a"].shape == (
        2,
        3,
    )
    return folder / "out"


def export_record(**fields):
    def change(folder, canary):
        path = folder / "export.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def role_content(data):
    def change(folder, canary):
        for path in folder.glob("vit-*"):
            path.unlink()
        (folder / "vit.safetensors").write_bytes(data)
        digest = role_files.hashlib.sha256(data).hexdigest()
        export_record(roles={"vit": ["vit.safetensors", digest]})(folder, canary)

    return change


def tensor_file(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def role_is_a_link(folder, canary):
    path = next(folder.glob("vit-*"))
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


RUN_EXPORTS = {
    "role_by_dotdot": export_record(roles={"vit": ["../canary/secret.txt", "0" * 64]}),
    "role_by_absolute_path": export_record(roles={"vit": ["/etc/passwd", "0" * 64]}),
    "role_is_a_link": role_is_a_link,
    "role_is_a_folder": export_record(roles={"vit": [".", "0" * 64]}),
    "role_of_another_hash": export_record(roles={"vit": ["export.json", "0" * 64]}),
    "role_is_no_pair": export_record(roles={"vit": ["a"]}),
    "roles_are_a_list": export_record(roles=["vit"]),
    "model_is_text": export_record(model="vit"),
    "notes_are_a_number": export_record(notes=3),
    "record_is_deep": lambda f, c: (f / "export.json").write_text('{"a":' * 10**5),
    "record_is_a_link": lambda f, c: replaced_by_link(f, c, "export.json"),
    "role_is_a_pickle": role_content(pickle.dumps({"a": 1})),
    "role_of_a_huge_shape": role_content(tensor_file({"a": entry([2**60], 0, 4)}, bytes(4))),
    "role_of_overlapping_arrays": role_content(
        tensor_file({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4))
    ),
    "role_of_an_array_in_an_array": role_content(
        tensor_file({"a": entry([1], 0, 4), "a/b": entry([1], 4, 8)}, bytes(8))
    ),
    "role_is_empty": role_content(b""),
}


@pytest.mark.parametrize("name", RUN_EXPORTS)
def test_exports_of_runs(tmp_path, canary, name, good_export):
    folder = shutil.copytree(good_export, tmp_path / "sent")
    RUN_EXPORTS[name](folder, canary)
    refused(lambda: weight_source.open_weights(folder), canary)


# Checkpoints of a run.


def newest(folder):
    return next((folder / "checkpoints").iterdir())


def state_link(folder, canary):
    path = largest(newest(folder) / "state")
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def frozen_link(folder, canary):
    path = next((folder / "frozen").iterdir())
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def state_name(folder, canary):
    path = newest(folder) / "state" / "_METADATA"
    path.write_text(path.read_text().replace("'ema'", "'../../canary/secret.txt'"))


CHECKPOINTS = {
    "a_file_of_the_state_is_a_link": state_link,
    "a_frozen_network_is_a_link": frozen_link,
    "a_frozen_network_is_missing": lambda f, c: shutil.rmtree(f / "frozen"),
    "an_array_named_by_a_path": state_name,
    "the_state_is_truncated": lambda f, c: largest(newest(f) / "state").write_bytes(b"x"),
    "the_state_is_missing": lambda f, c: shutil.rmtree(newest(f) / "state"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(tmp_path, canary, name, stage_workdir):
    folder = shutil.copytree(stage_workdir, tmp_path / "sent")
    CHECKPOINTS[name](folder, canary)
    refused(lambda: weight_source.open_weights(folder), canary)


# Images, moments, archives and caches.


def npy(array=None, shape=None, descr="|u1", data=b"", order=False):
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": order, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + (array.tobytes() if array is not None else data)


def npz(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def object_npy(value):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([value], object), allow_pickle=True)
    return file.getvalue()


IMAGES = npy(np.zeros((2, 4, 4, 3), np.uint8))
MOMENTS = {"mu": npy(np.zeros(3), descr="<f8"), "sigma": npy(np.zeros((3, 3)), descr="<f8")}
NPZ = {
    "pickle": lambda p, c: npz(p, {"arr_0.npy": object_npy(Gadget(c / "ran"))}),
    "pickle_beside": lambda p, c: npz(
        p, {"arr_0.npy": IMAGES, "mu.npy": object_npy(Gadget(c / "ran"))}
    ),
    "shape_of_2**50": lambda p, c: npz(p, {"arr_0.npy": npy(shape=(2**48, 4, 4, 3))}),
    "image_of_2**40": lambda p, c: npz(p, {"arr_0.npy": npy(shape=(1, 2**20, 2**20, 3))}),
    "negative_shape": lambda p, c: npz(p, {"arr_0.npy": npy(shape=(-1, -4, 4, 3), data=bytes(48))}),
    "bomb": lambda p, c: npz(
        p,
        {"arr_0.npy": npy(shape=(400, 512, 512, 3), data=bytes(400 * 512 * 512 * 3))},
        zipfile.ZIP_DEFLATED,
    ),
    "moments_of_2**40": lambda p, c: npz(
        p, {"arr_0.npy": IMAGES, "mu.npy": npy(shape=(2**40,), descr="<f8"), "sigma.npy": b"x"}
    ),
    "header_of_a_gigabyte": lambda p, c: npz(
        p, {"arr_0.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b"{"}
    ),
    "header_that_calls": lambda p, c: npz(
        p, {"arr_0.npy": npy(np.zeros(1)).replace(b"'shape'", b"os.walk")}
    ),
    "header_of_another_version": lambda p, c: npz(
        p, {"arr_0.npy": b"\x93NUMPY\x09\x00" + b" " * 80}
    ),
    "truncated": lambda p, c: p.write_bytes(npz(p, {"arr_0.npy": IMAGES}).read_bytes()[:-9]) and p,
    "no_zip": lambda p, c: p.write_bytes(b"PK\x03\x04" + bytes(99)) and p,
}


@pytest.mark.parametrize("name", NPZ)
def test_image_archives(tmp_path, canary, name):
    path = NPZ[name](tmp_path / "a.npz", canary)

    def load():
        for _ in adm_npz.open_archive(path).batches(64):
            pass
        adm_moments.read_moments(path, "pool3")

    refused(load, canary)
    refused(lambda: frechet.read_statistics(path), canary)


def archive_folder(tmp_path, manifest):
    folder = tmp_path / "sent"
    folder.mkdir()
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    return folder


def shard(name="a.array_record", size=6, sha256="0" * 64):
    return {"name": name, "bytes": size, "sha256": sha256}


CACHE = {"count": 2, "tokens": 4, "width": 8, "flipped": False, "format": "int8"}
RECIPE = {"source": "photos/112", "holdout": 0, "crop": "center", "image_size": 64}
MANIFESTS = {
    "dotdot": {"shards": [shard("../canary/secret.txt")], "label_names": []},
    "absolute": {"shards": [shard("/etc/passwd")], "label_names": []},
    "name_is_a_list": {"shards": [shard(["a"])], "label_names": []},
    "no_shards": {"label_names": []},
    "shards_are_text": {"shards": "abc", "label_names": []},
    "labels_are_numbers": {"shards": [], "label_names": [3]},
    "is_a_list": "[]",
    "is_deep": "[" * 10**6,
    "shard_is_missing": {"shards": [shard()], "label_names": []},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(tmp_path, canary, name):
    manifest = MANIFESTS[name]
    folder = archive_folder(tmp_path, manifest)
    refused(lambda: sources.open_records(f"array_record:{folder}", "train"), canary)
    (folder / "train").mkdir()
    if isinstance(manifest, dict):
        manifest = {**manifest, **CACHE, "images": RECIPE}
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "train" / "manifest.json").write_text(text)
    config = {**RECIPE, "latents": str(folder), "flip": False}
    refused(lambda: latent_reader.open_latents(config, "train"), canary)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 2**40},
        {"tokens": -1},
        {"width": "wide"},
        {"count": 2**60},
        {"flipped": "no"},
        {"format": "pickle"},
        {"format": ["int8"]},
        {"images": [3]},
    ],
)
def test_caches(tmp_path, canary, fields):
    manifest = {"shards": [shard()], "label_names": [], **CACHE, "images": RECIPE, **fields}
    (tmp_path / "sent").mkdir()
    folder = archive_folder(tmp_path / "sent", manifest)
    (folder / "a.array_record").write_bytes(b"xyzzy!")
    folder.rename(tmp_path / "sent" / "train")
    config = {**RECIPE, "latents": str(tmp_path / "sent"), "flip": False}
    refused(lambda: latent_reader.open_latents(config, "train"), canary)


def tar(path, make):
    with tarfile.open(path, "w") as archive:
        make(archive)
    return path


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


TARS = {
    "only_links": lambda t, c: t.addfile(
        member("a/1.png", type=tarfile.SYMTYPE, linkname=str(c / "secret.txt"))
    ),
    "only_devices": lambda t, c: t.addfile(member("a/1.png", type=tarfile.CHRTYPE)),
    "nothing": lambda t, c: None,
}


@pytest.mark.parametrize("name", TARS)
def test_tars(tmp_path, canary, name):
    path = tar(tmp_path / "a.tar", lambda archive: TARS[name](archive, canary))
    refused(lambda: sources.open_records(f"tar:{path}", "train"), canary)


def test_there_are_sixty_artefacts():
    groups = (WEIGHTS, CONVERSIONS, EXPORTS, RUN_EXPORTS, CHECKPOINTS, NPZ, MANIFESTS, TARS)
    assert sum(map(len, groups)) >= 60


def test_what_is_good_is_read(tmp_path, good_conversion, good_export):
    """The same loaders on the artefacts that the hostile ones were made of."""
    assert conversion.load(good_conversion).params["vit"]
    assert weight_source.open_weights(good_export).model
    export.export_directory("dinov3", good_conversion, tmp_path / "back.safetensors")
    ordered = collections.OrderedDict(FACEBOOK)
    convert.convert_file("dinov3", [write_torch(tmp_path / "a.pth", ordered)], tmp_path / "out")
    path = npz(tmp_path / "a.npz", {"arr_0.npy": IMAGES})
    assert sum(len(batch) for batch in adm_npz.open_archive(path).batches(1)) == 2
