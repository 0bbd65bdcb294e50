"""The latent convention: storage, validation, comparison."""

import dataclasses
import json

import pytest

from dinosae_jax.latent_convention import LatentConvention

OURS = LatentConvention(tokens=256, width=1024, radius=32.0, decode_radius=14.0)


def test_round_trip_through_json():
    assert LatentConvention.from_dict(json.loads(json.dumps(OURS.to_dict()))) == OURS


def test_equal_conventions_pass():
    OURS.check_equal(dataclasses.replace(OURS, decode_radius=14.0 * (1 + 1e-8)))
    unmeasured = dataclasses.replace(OURS, decode_radius=None)
    OURS.check_equal(unmeasured)
    unmeasured.check_equal(OURS)


def test_every_differing_field_is_named_in_one_line():
    other = LatentConvention(64, 1024, 1.0, 27.7, norm="layernorm", pixels="unit")
    with pytest.raises(ValueError, match="flow != cache") as caught:
        OURS.check_equal(other, here="flow", there="cache")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "tokens 256 != 64",
        "radius 32.0 != 1.0",
        "decode_radius 14.0 != 27.7",
        "norm",
        "pixels",
    ):
        assert part in message
    assert "width" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius must be a positive number; got 0.0"),
        ({"decode_radius": -1.0}, "decode_radius must be a positive"),
        ({"tokens": 0}, "tokens must be a positive"),
        ({"tokens": "many"}, "tokens must be a positive number; got 'many'"),
        ({"tokens": None}, "tokens must be a positive number; got None"),
        ({"width": True}, "width must be a positive number"),
        ({"radius": float("inf")}, "radius must be a positive number; got inf"),
        ({"radius": float("nan")}, "radius must be a positive number; got nan"),
        ({"norm": "batch"}, "norm is one of .*; got 'batch'"),
        ({"pixels": "bytes"}, "pixels is one of .*; got 'bytes'"),
    ],
)
def test_bad_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OURS, **change)


def test_missing_and_unknown_fields_are_named():
    fields = OURS.to_dict()
    fields["raduis"] = fields.pop("radius")
    with pytest.raises(ValueError, match=r"missing \['radius'\], unknown \['raduis'\]"):
        LatentConvention.from_dict(fields)


def test_fields_may_be_left_out_of_the_comparison():
    other = dataclasses.replace(OURS, radius=1.0)
    OURS.check_equal(other, leave_out=("radius",))
    with pytest.raises(ValueError, match=r"got radius 32\.0 != 1\.0 \(this != other\); load"):
        OURS.check_equal(other)
