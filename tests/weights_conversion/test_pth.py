"""The .pth reader: equal to what was written, and hostile files refused in one line."""

import collections
import contextlib
import os
import pickle
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights_conversion.torch_zip import (
    Call,
    Global,
    central_headers,
    crc,
    rebuild,
    storage,
    write_torch,
)
from weights_conversion.readers.pth import read_pth
from weights_conversion.readers.stored import RefusedFileError, StoredTensor

RNG = np.random.default_rng(0)
ARRAYS = {
    "weight": RNG.standard_normal((3, 4, 5)).astype(np.float32),
    "half": RNG.standard_normal((6,)).astype(np.float16),
    "brain": RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
    "flag": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
}
FLOATS = {"0": np.arange(12, dtype=np.float32)}


def assert_refused(path, says):
    with pytest.raises(RefusedFileError) as caught:
        read_pth(path)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message and len(message) < 400


def test_reads_back_every_type_bitwise(tmp_path):
    value = {
        "ema": collections.OrderedDict(ARRAYS),
        "epoch": 12,
        "lr": 1e-4,
        "betas": (0.9, 0.95),
        "groups": [{"params": [0, 1]}],
        "big": 2**40,
        "none": None,
    }
    saved = read_pth(write_torch(tmp_path / "a.pth", value))
    assert list(saved) == list(value) and saved["betas"] == (0.9, 0.95)
    assert saved["groups"] == [{"params": [0, 1]}] and saved["big"] == 2**40
    for key, array in ARRAYS.items():
        read = np.asarray(saved["ema"][key])
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_strided_views_share_a_storage(tmp_path):
    store = storage("0", "FloatStorage", 12)
    value = {"t": rebuild(store, 0, (4, 3), (1, 4)), "row": rebuild(store, 4, (4,), (1,))}
    saved = read_pth(write_torch(tmp_path / "a.pth", value, FLOATS))
    base = FLOATS["0"].reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(saved["t"]), base.T)
    np.testing.assert_array_equal(np.asarray(saved["row"]), base[1])


def test_parameters_are_tensors(tmp_path):
    inner = rebuild(storage("0", "FloatStorage", 12), 0, (12,), (1,))
    hooks = Call(Global("collections OrderedDict"), ())
    value = {"w": Call(Global("torch._utils _rebuild_parameter"), (inner, True, hooks))}
    saved = read_pth(write_torch(tmp_path / "a.pth", value, FLOATS))
    np.testing.assert_array_equal(np.asarray(saved["w"]), FLOATS["0"])


class Gadget:
    """What an attacker would send: its unpickling runs a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_gadgets_are_refused_and_not_run(tmp_path, protocol):
    mark = tmp_path / "ran"
    data = pickle.dumps({"w": Gadget(mark)}, protocol)
    path = write_torch(tmp_path / "a.pth", {}, pickle=data)
    with pytest.raises(RefusedFileError):
        read_pth(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "builtins getattr",
        "torch load",
        "torch._utils _rebuild_sparse_tensor",
        "torch.hub load",
        "numpy.core.multiarray _reconstruct",
        "collections defaultdict",
        "torch FloatStorage.__init__",
    ],
)
def test_other_globals_are_refused_by_name(tmp_path, name):
    assert_refused(write_torch(tmp_path / "a.pth", Global(name)), name.replace(" ", "."))


def test_storage_types_cannot_be_called(tmp_path):
    assert_refused(write_torch(tmp_path / "a.pth", Call(Global("torch FloatStorage"), ())), "calls")


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "says"),
    [
        (0, (13,), (1,), "outside its storage"),
        (1, (12,), (1,), "outside its storage"),
        (0, (3, 4), (5, 1), "outside its storage"),
        (0, (10**12,), (0,), "outside its storage"),
        (11, (12,), (-1,), "negative"),
        (-1, (3,), (1,), "negative"),
        (0, (-3,), (1,), "negative"),
        (0, (2**62,), (1,), "absurd"),
        (0, (0, 2**40, 2**40), (1, 1, 1), "absurd"),
        (0, (1,) * 40, (1,) * 40, "absurd"),
        (0, (3, 4), (1,), "whole numbers"),
        (0, (3.0,), (1,), "whole numbers"),
        (True, (3,), (1,), "whole numbers"),
        (0, "ab", "cd", "whole numbers"),
    ],
)
def test_windows_outside_a_storage_are_refused(tmp_path, offset, shape, strides, says):
    store = storage("0", "FloatStorage", 12)
    hooks = Call(Global("collections OrderedDict"), ())
    call = Call(
        Global("torch._utils _rebuild_tensor_v2"), (store, offset, shape, strides, False, hooks)
    )
    assert_refused(write_torch(tmp_path / "a.pth", {"w": call}, FLOATS), says)


@pytest.mark.parametrize(
    ("store", "says"),
    [
        (storage("0", "FloatStorage", 13), "declares 13 elements"),
        (storage("0", "FloatStorage", -1), "declares -1 elements"),
        (storage("0", "DoubleStorage", 12), "declares 12 elements"),
        (storage("1", "FloatStorage", 12), "is missing"),
        (storage("../0", "FloatStorage", 12), "is missing"),
        (storage("0", "ComplexFloatStorage", 6), "ComplexFloatStorage"),
    ],
)
def test_wrong_storages_are_refused(tmp_path, store, says):
    value = {"w": rebuild(store, 0, (1,), (1,))}
    assert_refused(write_torch(tmp_path / "a.pth", value, FLOATS), says)


def test_many_tensors_over_one_storage_are_refused(tmp_path):
    store = storage("0", "FloatStorage", 4096)
    value = [rebuild(store, offset, (4000,), (1,)) for offset in range(60)]
    path = write_torch(tmp_path / "a.pth", value, {"0": np.zeros(4096, np.float32)})
    assert_refused(path, "twice the file's size")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"byteorder": b"big"}, "byte order"),
        ({"method": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"extra": {"../../etc/passwd": b"x"}}, "leaves the archive"),
        ({"extra": {"/etc/passwd": b"x"}}, "leaves the archive"),
        ({"extra": {"a/..\\x": b"x"}}, "leaves the archive"),
        ({"extra": {"other/data.pkl": b"x"}}, "one folder"),
        ({"extra": {"a/byteorder": b"big"}}, "twice"),
        ({"pickle": b"\x80\x02}"}, "damaged"),
        ({"pickle": b"\x80\x02}.}."}, "left over"),
        ({"pickle": b"\x80\x02N(u."}, "where a dict belongs"),
        ({"pickle": b"\x80\x02u."}, "never opened"),
        ({"pickle": b"\x80\x02h\x07."}, "never stored"),
        ({"pickle": b"\x80\x02" + b"}0" * 9 + b"N."}, "POP"),
        ({"pickle": b"\x80\x02" + b"N" * 1_100_000 + b"."}, "opcodes"),
        ({"pickle": b"N" * ((1 << 24) + 1)}, "over the limit"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_archives_are_refused(tmp_path, changes, says):
    assert_refused(write_torch(tmp_path / "a.pth", {"w": ARRAYS["weight"]}, **changes), says)


def test_nested_tuples_as_keys_are_refused(tmp_path):
    # Hashing this key would take 2^60 steps.
    data = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00Ns."
    assert_refused(write_torch(tmp_path / "a.pth", {}, pickle=data), "as a key")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"w": 1}, 2))
    assert_refused(path, "neither format")
    assert_refused(path, "save the state dict alone as safetensors")
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "pickle")
    assert_refused(path, "neither format")
    path.write_bytes(b"")
    assert_refused(path, "truncated")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/readme", "x")
    assert_refused(path, "data.pkl is missing")


def test_members_that_share_bytes_are_refused(tmp_path):
    path = write_torch(tmp_path / "a.pth", {"a": np.ones(64, np.float32), "b": np.ones(64, "f4")})
    data = bytearray(path.read_bytes())
    headers = central_headers(bytes(data))
    names = [data[h + 46 : h + 46 + struct.unpack_from("<H", data, h + 28)[0]] for h in headers]
    first, second = names.index(b"a/data/0"), names.index(b"a/data/1")
    # The second storage's entry points into the first one's data, where a forged header stands.
    (local,) = struct.unpack_from("<L", data, headers[second] + 42)
    forged = data[local : local + 30 + len(b"a/data/1")]
    (start,) = struct.unpack_from("<L", data, headers[first] + 42)
    inside = start + 30 + len(b"a/data/0")
    data[inside : inside + len(forged)] = forged
    struct.pack_into("<L", data, headers[second] + 42, inside)
    path.write_bytes(data)
    assert_refused(path, "overlap")


def test_declared_sizes_are_not_trusted(tmp_path):
    path = write_torch(tmp_path / "a.pth", {"a": np.ones(64, np.float32)})
    data = bytearray(path.read_bytes())
    for header in central_headers(bytes(data)):
        struct.pack_into("<2L", data, header + 20, 2**31, 2**31)
    path.write_bytes(data)
    assert_refused(path, "outside the file")


def test_every_truncation_is_refused(tmp_path):
    path = write_torch(tmp_path / "a.pth", {"w": ARRAYS["weight"]})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(RefusedFileError):
            read_pth(path)


def test_the_message_stays_one_line(tmp_path):
    assert_refused(write_torch(tmp_path / "a.pth", Global("os\x1b[31m" + "x" * 999 + " y")), "os?[")


def tensors_in(value):
    if isinstance(value, StoredTensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    ),
    in_pickle=st.booleans(),
)
def test_mutated_files_are_refused_or_stay_inside(tmp_path, changes, in_pickle):
    """Whatever bytes change, the reader refuses, or gives tensors within the file."""
    path = write_torch(tmp_path / "a.pth", {"m": collections.OrderedDict(ARRAYS), "n": (1, [2.5])})
    data = bytearray(path.read_bytes())
    if in_pickle:  # with a checksum that fits, so that the machine sees the changed stream
        start = data.find(b"\x80\x02")
        length = data.find(b"PK\x03\x04", start) - start
    else:
        start, length = 0, len(data)
    for where, value in changes:
        data[start + int(where * length)] = value
    if in_pickle:
        header = central_headers(bytes(data))[0]
        data[header + 16 : header + 20] = crc(bytes(data[start : start + length]))
    path.write_bytes(data)
    try:
        saved = read_pth(path)
    except RefusedFileError as error:
        assert "\n" not in str(error)
        return
    for tensor in tensors_in(saved):
        assert np.asarray(tensor).nbytes <= len(data)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stream=st.binary(max_size=60), head=st.sampled_from([b"", b"\x80\x02", b"\x80\x04(]}"]))
def test_arbitrary_pickles_raise_nothing_else(tmp_path, stream, head):
    path = write_torch(tmp_path / "a.pth", {}, pickle=head + stream + b".")
    with contextlib.suppress(RefusedFileError):
        read_pth(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_equal_to_torch(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = layer.state_dict()
    state["half"] = torch.randn(5).half()
    state["brain"] = torch.randn(5).bfloat16()
    state["flags"] = torch.tensor([True, False])
    state["turned"] = torch.randn(4, 6).T[1:3]
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    saved = {"model": state, "ema": dict(state), "size": torch.Size([1, 2]), "epoch": 3}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    read = read_pth(tmp_path / "a.pth")
    assert read["size"] == (1, 2) and read["epoch"] == 3
    for key, tensor in state.items():
        expected = tensor.detach().float().numpy()
        for part in ("model", "ema"):
            np.testing.assert_array_equal(np.asarray(read[part][key]).astype(np.float32), expected)
