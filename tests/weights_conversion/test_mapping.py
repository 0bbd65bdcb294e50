"""The rules engine: strict in both directions, and its transforms are invertible."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights_conversion.mapping import (
    Layout,
    MismatchError,
    convert,
    from_flax,
    restore,
    source_names,
    to_flax,
)

TABLE = Layout(
    "example",
    {"vit": {}},
    {
        "vit": "",
        "vit/blocks": "blocks.{i+1}",
        "vit/blocks/qkv/bias": ("blocks.{i+1}.q_bias", None, "blocks.{i+1}.v_bias"),
        "vit/stages_0": "stages.7",
    },
    buffers={r".*\.mask": ()},
    optional=("vit/patch",),
    derive=lambda path, shape: np.ones(shape) if path == "vit/periods" else None,
)
EXPECTED = {
    "vit/params/cls_token": (1, 3),
    "vit/params/periods": (2,),
    "vit/params/patch/kernel": (2, 2),
    "vit/params/blocks/qkv/kernel": (2, 3, 9),
    "vit/params/blocks/qkv/bias": (2, 9),
    "vit/params/stages_0/op_1/conv/kernel": (3, 3, 2, 4),
}


def state():
    rng = np.random.default_rng(0)
    found = {
        "cls_token": rng.normal(size=(1, 1, 3)),
        "stages.7.op.1.conv.weight": rng.normal(size=(4, 2, 3, 3)).astype(np.float16),
        "stages.7.mask": np.array(3),
    }
    for i in (1, 2):
        found[f"blocks.{i}.qkv.weight"] = rng.normal(size=(9, 3))
        found[f"blocks.{i}.q_bias"] = rng.normal(size=3)
        found[f"blocks.{i}.v_bias"] = rng.normal(size=3)
    return found


def test_names_follow_the_longest_row_and_the_naming_rule():
    assert source_names(TABLE, "vit/stages_0/op_1/conv/kernel") == ("stages.7.op.1.conv.weight",)
    assert source_names(TABLE, "vit/blocks/norm1/scale") == ("blocks.{i+1}.norm1.weight",)
    assert source_names(TABLE, "vit/blocks/qkv/bias")[1] is None


def test_every_tensor_lands_in_its_place_and_comes_back():
    source = state()
    done = convert(source, TABLE, EXPECTED)
    bias = done.arrays["vit/params/blocks/qkv/bias"]
    np.testing.assert_array_equal(bias[1, :3], source["blocks.2.q_bias"])
    assert not bias[:, 3:6].any()
    np.testing.assert_array_equal(bias[0, 6:], source["blocks.1.v_bias"])
    kernel = done.arrays["vit/params/blocks/qkv/kernel"]
    np.testing.assert_array_equal(kernel[0], source["blocks.1.qkv.weight"].T)
    assert done.arrays["vit/params/stages_0/op_1/conv/kernel"].dtype == np.float16
    assert done.derived == ["vit/params/periods"]
    assert done.absent == ["vit/params/patch/kernel"]
    assert [entry.key for entry in done.entries] == list(source)
    for entry in done.entries:
        back = restore(entry, done.arrays[entry.target])
        assert back.dtype == source[entry.key].dtype and back.shape == source[entry.key].shape
        assert back.tobytes() == source[entry.key].tobytes()


def test_all_disagreements_are_in_one_error():
    source = state()
    del source["blocks.2.v_bias"], source["cls_token"]
    source |= {"extra.weight": np.ones(2), "blocks.3.q_bias": np.ones(3)}
    source["blocks.1.qkv.weight"] = np.ones((9, 4))
    source["stages.7.op.1.conv.weight"] = np.ones(4)
    with pytest.raises(MismatchError) as caught:
        convert(source, TABLE, EXPECTED)
    lines = str(caught.value).splitlines()
    assert "2 missing, 2 unexpected, 2 misshapen" in lines[0]
    assert {line.strip().split(" ")[1] for line in lines[1:]} == {
        "blocks.2.v_bias",
        "cls_token",
        "extra.weight",
        "blocks.3.q_bias",
        "blocks.1.qkv.weight",
        "stages.7.op.1.conv.weight",
    }


def test_an_optional_part_is_all_or_nothing():
    table = Layout("x", {}, {"vit": ""}, optional=("vit/patch",))
    expected = {"vit/params/patch/kernel": (2, 2), "vit/params/patch/bias": (2,)}
    assert convert({}, table, expected).absent == list(expected)


def test_empty_leaves_need_no_tensor():
    done = convert({}, Layout("x", {}, {"vit": ""}), {"vit/params/storage_tokens": (1, 0, 3)})
    assert done.arrays["vit/params/storage_tokens"].shape == (1, 0, 3)


def test_a_leaf_without_a_row_is_an_error():
    with pytest.raises(MismatchError, match="got none for"):
        source_names(TABLE, "dit/blocks/kernel")


def test_stacks_of_mixed_precision_keep_every_value():
    source = state()
    source["blocks.1.q_bias"] = source["blocks.1.q_bias"].astype(np.float16)
    done = convert(source, TABLE, EXPECTED)
    for entry in done.entries:
        assert restore(entry, done.arrays[entry.target]).tobytes() == source[entry.key].tobytes()


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_kernels_turn_both_ways(shape):
    torch = np.arange(np.prod(shape)).reshape(shape)
    flax = to_flax(torch, "kernel", tuple(shape))
    assert flax.shape[-2:] == (shape[1], shape[0])
    np.testing.assert_array_equal(from_flax(flax, "kernel", tuple(shape)), torch)
