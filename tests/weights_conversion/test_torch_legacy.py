"""The format from before torch 1.6: the same tensors as the zip form, and lying files refused."""

import collections
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights_conversion.test_pth import (
    ARRAYS,
    FLOATS,
    Gadget,
    assert_refused,
    tensors_in,
)
from tests.weights_conversion.torch_legacy import SYSTEM, Build, New, write_legacy
from tests.weights_conversion.torch_zip import (
    Call,
    Global,
    Persistent,
    rebuild,
    storage,
    write_torch,
)
from weights_conversion.readers import containers
from weights_conversion.readers.pth import read_pth
from weights_conversion.readers.stored import RefusedFileError

WHOLE = storage("0", "FloatStorage", 12)


def plain(value):
    """What was read, with the bytes of its tensors."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if hasattr(value, "span"):
        array = np.asarray(value)
        return array.dtype, array.shape, array.tobytes()
    return value


@pytest.mark.parametrize("python_2", [False, True])
def test_equal_to_the_zip_form(tmp_path, python_2):
    value = {
        "model": collections.OrderedDict(ARRAYS),
        "epoch": 12,
        "betas": (0.9, [0.95]),
        "big": 2**40,
        "none": None,
    }
    old = read_pth(write_legacy(tmp_path / "old.pth", value, python_2=python_2))
    new = read_pth(write_torch(tmp_path / "new.pth", value))
    assert plain(old) == plain(new)
    assert plain(old["model"]["half"])[2] == ARRAYS["half"].tobytes()


def test_strided_views_share_a_storage(tmp_path):
    value = {"t": rebuild(WHOLE, 0, (4, 3), (1, 4)), "row": rebuild(WHOLE, 4, (4,), (1,))}
    old = read_pth(write_legacy(tmp_path / "old.pth", value, FLOATS))
    new = read_pth(write_torch(tmp_path / "new.pth", value, FLOATS))
    assert plain(old) == plain(new)
    np.testing.assert_array_equal(np.asarray(old["t"]), FLOATS["0"].reshape(3, 4).T)


def test_several_storages_are_found_behind_one_another(tmp_path):
    arrays = {name: np.full(size, size, np.int64) for name, size in (("a", 3), ("b", 0), ("c", 5))}
    keys = {"a": "9", "b": "10", "c": "8"}  # written in the order of the keys: 10, 8, 9
    value = {
        name: rebuild(storage(keys[name], "LongStorage", array.size), 0, array.shape, (1,))
        for name, array in arrays.items()
    }
    stored = {keys[name]: array for name, array in arrays.items()}
    saved = read_pth(write_legacy(tmp_path / "a.pth", value, stored))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(saved[name]), array)


def view(*part):
    return Persistent((*WHOLE, part))


def test_views_of_a_storage(tmp_path):
    value = {
        "whole": rebuild(WHOLE, 0, (12,), (1,)),
        "part": rebuild(view("7", 4, 6), 1, (2, 2), (2, 1)),
    }
    saved = read_pth(write_legacy(tmp_path / "a.pth", value, FLOATS))
    np.testing.assert_array_equal(np.asarray(saved["part"]), [[5, 6], [7, 8]])
    np.testing.assert_array_equal(np.asarray(saved["whole"]), FLOATS["0"])


PARAMETER = Global("torch.nn.parameter Parameter")
FIRST_TENSOR = Call(Global("torch._utils _rebuild_tensor"), (WHOLE, 0, (3, 4), (4, 1)))


@pytest.mark.parametrize(
    "parameter",
    [
        FIRST_TENSOR,
        Build(Call(PARAMETER, (FIRST_TENSOR,)), (True, False, None)),
        Build(New(PARAMETER, ()), (FIRST_TENSOR, None, None, True, False)),
    ],
)
def test_parameters_of_the_first_versions(tmp_path, parameter):
    saved = read_pth(write_legacy(tmp_path / "a.pth", {"w": parameter}, FLOATS))
    np.testing.assert_array_equal(np.asarray(saved["w"]), FLOATS["0"].reshape(3, 4))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Build(New(PARAMETER, ()), (1, None, None, True, False)), "a parameter is not"),
        (Build(New(PARAMETER, ()), {"data": FIRST_TENSOR}), "a parameter is not"),
        (Build(New(PARAMETER, (FIRST_TENSOR,)), (True,)), "a parameter is not"),
        (New(PARAMETER, ()), "left over"),
        (Call(PARAMETER, (FIRST_TENSOR,)), "left over"),
        (Build(FIRST_TENSOR, (1, 2, 3)), "state of a StoredTensor"),
        (New(Global("torch FloatStorage"), ()), "where a Class belongs"),
        (New(Global("collections OrderedDict"), ()), "where a Class belongs"),
        (Call(Global("collections OrderedDict"), ([["a", 1, 2]],)), "other than its items"),
        (Call(Global("collections OrderedDict"), ([[("a",), 1]],)), "a tuple as a key"),
        (Call(Global("collections OrderedDict"), ({"a": 1},)), "other than its items"),
        (Global("os system"), "os.system"),
        (rebuild(Persistent(WHOLE[:4]), 0, (1,), (1,)), "a persistent id is not"),
        (Persistent(("module", Global("torch Size"), "a.py", "class A")), "a persistent id is not"),
        (rebuild(Persistent((*WHOLE, 0)), 0, (1,), (1,)), "a view of a storage is not"),
        (rebuild(view("7", 4), 0, (1,), (1,)), "a view of a storage is not"),
        (rebuild(view("7", True, 1), 0, (1,), (1,)), "a view of a storage is not"),
        (rebuild(view("7", 4, 9), 0, (1,), (1,)), "outside its storage"),
        (rebuild(view("7", -1, 3), 0, (1,), (1,)), "outside its storage"),
        (rebuild(view("7", 4, 3), 0, (4,), (1,)), "outside its storage"),
        (rebuild(WHOLE, 1, (12,), (1,)), "outside its storage"),
        (rebuild(WHOLE, 0, (10**12,), (0,)), "outside its storage"),
        (rebuild(storage("0", "FloatStorage", -1), 0, (1,), (1,)), "declares -1 elements"),
        (rebuild(storage("0", "FloatStorage", 2**62), 0, (1,), (1,)), "elements of float32"),
        (rebuild(storage("0", "FloatStorage", 13), 0, (1,), (1,)), "but has 12"),
        (rebuild(storage("0", "DoubleStorage", 12), 0, (1,), (1,)), "truncated"),
        (rebuild(storage("1", "FloatStorage", 12), 0, (1,), (1,)), "does not agree"),
        (
            [
                rebuild(WHOLE, 0, (1,), (1,)),
                rebuild(storage("0", "DoubleStorage", 12), 0, (1,), (1,)),
            ],
            "two types or sizes",
        ),
    ],
)
def test_lying_pickles_are_refused(tmp_path, value, says):
    assert_refused(write_legacy(tmp_path / "a.pth", {"w": value}, FLOATS), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 1002}, "1002, not 1001"),
        ({"version": "1001"}, "not 1001"),
        ({"system": [1]}, "not 1001"),
        ({"system": Gadget("/nowhere")}, "posix.system"),
        ({"keys": {"0": 1}}, "not a list of keys"),
        ({"keys": [0]}, "not a list of keys"),
        ({"keys": ["0", "0"]}, "does not agree"),
        ({"keys": []}, "does not agree"),
        ({"keys": ["0", "1"]}, "does not agree"),
        ({"keys": Gadget("/nowhere")}, "posix.system"),
        ({"counts": {"0": 11}}, "but has 11"),
        ({"counts": {"0": -(2**63)}}, "but has -9223372036854775808"),
        ({"tail": b"x"}, "1 bytes follow the last storage"),
        ({"pickle": b"\x80\x02}"}, "left over"),
        ({"pickle": b"\x80\x02X\xff\xff\xff\x7f."}, "damaged"),
        ({"pickle": b"\x80\x02NN."}, "left over"),
        ({"pickle": b"\x80\x02" + b"N" * 1_100_000 + b"."}, "opcodes"),
        ({"pickle": b"\x80\x02" + b"X\xff\xff\x0f\x00" + b"x" * (1 << 24)}, "damaged"),
        ({"pickle": b"\x80\x02(X\x01\x00\x00\x00aNtQ."}, "a persistent id is not"),
    ],
)
def test_lying_files_are_refused(tmp_path, changes, says):
    value = {"w": rebuild(WHOLE, 0, (12,), (1,))}
    assert_refused(write_legacy(tmp_path / "a.pth", value, FLOATS, **changes), says)


def test_an_object_without_state_is_not_recalled(tmp_path):
    stream = b"\x80\x02](ctorch.nn.parameter\nParameter\n)\x81q\x00h\x00e."
    assert_refused(write_legacy(tmp_path / "a.pth", {}, pickle=stream), "before its state is set")


def test_a_long_list_of_items_is_used_once(tmp_path):
    # 100,000 dictionaries of 100,000 items would take hours.
    items = b"](]q\x00(X\x01\x00\x00\x00aNe" + b"h\x00" * 100_000 + b"e\x85q\x01"
    again = b"ccollections\nOrderedDict\nq\x02" + b"h\x01R" + b"h\x02h\x01R" * 100_000
    stream = b"\x80\x02(" + items + again + b"t."
    saved = read_pth(write_legacy(tmp_path / "a.pth", {}, pickle=stream))
    assert saved[1] == {"a": None} and saved[2] == {} and len(saved) == 100_002


def test_many_tensors_over_one_storage_are_refused(tmp_path):
    store = storage("0", "FloatStorage", 4096)
    value = [rebuild(store, offset, (4000,), (1,)) for offset in range(60)]
    path = write_legacy(tmp_path / "a.pth", value, {"0": np.zeros(4096, np.float32)})
    assert_refused(path, "twice the file's size")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_gadgets_are_refused_and_not_run(tmp_path, protocol):
    mark = tmp_path / "ran"
    data = pickle.dumps({"w": Gadget(mark)}, protocol)
    with pytest.raises(RefusedFileError):
        read_pth(write_legacy(tmp_path / "a.pth", {}, pickle=data))
    with pytest.raises(RefusedFileError):
        read_pth(write_legacy(tmp_path / "a.pth", {}, system={**SYSTEM, "x": Gadget(mark)}))
    assert not mark.exists()


def test_every_truncation_is_refused(tmp_path):
    path = write_legacy(tmp_path / "a.pth", {"w": ARRAYS["weight"], "n": ARRAYS["count"]})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(RefusedFileError):
            read_pth(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_mutated_files_are_refused_or_stay_inside(tmp_path, changes):
    value = {"m": collections.OrderedDict(ARRAYS), "p": PARAMETER_STATE, "n": (1, [2.5])}
    data = bytearray(write_legacy(tmp_path / "a.pth", value, {"9": FLOATS["0"]}).read_bytes())
    for where, byte in changes:
        data[int(where * len(data))] = byte
    (tmp_path / "a.pth").write_bytes(data)
    try:
        saved = read_pth(tmp_path / "a.pth")
    except RefusedFileError as error:
        assert "\n" not in str(error)
        return
    for tensor in tensors_in(saved):
        assert np.asarray(tensor).nbytes <= len(data)


NINTH = storage("9", "FloatStorage", 12)
PARAMETER_STATE = Build(
    New(PARAMETER, ()),
    (
        Call(Global("torch._utils _rebuild_tensor"), (NINTH, 0, (3, 4), (4, 1))),
        None,
        None,
        True,
        False,
    ),
)


def test_lpips_heads_from_the_old_format(tmp_path):
    rng = np.random.default_rng(0)
    heads = {
        f"lin{index}.model.1.weight": rng.random((1, width, 1, 1)).astype(np.float32)
        for index, width in enumerate((64, 128, 256, 512, 512))
    }
    old = write_legacy(tmp_path / "vgg.pth", collections.OrderedDict(heads), python_2=True)
    (state,) = containers.read([old], "lpips_vgg16")
    for key, value in heads.items():
        np.testing.assert_array_equal(np.asarray(state.tensors[key]), value)
