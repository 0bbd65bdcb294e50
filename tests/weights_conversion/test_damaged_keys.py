"""A state dict with one key missing or misshapen: the error names it, whichever key it is.

The configuration is read off the same keys, so each of them could mislead the reader.
"""

import functools
import json

import pytest

from tests.weights_conversion import layouts
from weights_conversion import mapping, modules, tables
from weights_conversion.verification.golden import read_golden

# What a file may lack: buffers that the model does not read, the teacher's patches as a whole, and
# DiT^DH's positions, which are a choice of the model.
OPTIONAL = (
    "bias_mask",
    "num_batches_tracked",
    "local_cls_norm.weight",
    "local_cls_norm.bias",
    "freqs_cos",
    "freqs_sin",
)
FILES = [
    ("dinov3", "autoencoder/c_dinov3_mlp", layouts.hugging_face),
    ("dinosae", "autoencoder/e_autoencoder", lambda state: state),
    (
        "lightningdit",
        "generation_models/orig_lightningdit/qk1_sw0_ro0_rm1_ws1",
        lambda state: state,
    ),
]
MORE_FILES = [
    ("dinov3", "autoencoder/c_dinov3_mlp", lambda state: state),
    ("dinov3", "autoencoder/c_dinov3_swiglu", lambda state: state),
    ("dinov3", "autoencoder/c_dinov3_mlp", functools.partial(layouts.timm, qkvb=True)),
    ("dcae_decoder", "autoencoder/f_dcae_original", lambda state: state),
    ("dcae_decoder", "autoencoder/f_dcae_original", layouts.diffusers),
    (
        "rae_lightningdit",
        "generation_models/rae_lightningdit/qk1_sw1_ro1_rm0",
        lambda state: state,
    ),
]


class Stored:
    """A tensor of which the engine needs the shape until it has found no fault."""

    dtype = "float32"

    def __init__(self, shape):
        self.shape = shape


@functools.cache
def model_shapes(config):
    return modules.shapes(json.loads(config))


def complaints(kind, shapes):
    """The lines of the error, without the first."""
    layout = tables.plan(kind, shapes)
    tensors = {key: Stored(shape) for key, shape in shapes.items()}
    with pytest.raises(mapping.MismatchError) as caught:
        mapping.convert(tensors, layout, model_shapes(json.dumps(layout.config)))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("kind", "name", "rename"),
    [*FILES, *(pytest.param(*file, marks=pytest.mark.slow) for file in MORE_FILES)],
)
def test_every_damaged_key_is_named(data_dir, kind, name, rename):
    state = rename(read_golden(data_dir / f"{name}.safetensors").weights)
    shapes = {key: value.shape for key, value in state.items()}
    for key, shape in shapes.items():
        if not key.endswith(OPTIONAL):
            without = {other: size for other, size in shapes.items() if other != key}
            assert f"missing: {key}" in complaints(kind, without)
        for wrong in ((*shape, 3), (*shape[:-1], shape[-1] + 1) if shape else (2,)):
            found = complaints(kind, shapes | {key: wrong})
            assert any(line.startswith(f"misshapen: {key} [") for line in found), (key, found)


def test_many_damaged_keys_are_in_one_error(data_dir):
    state = read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights
    shapes = {key: value.shape for key, value in state.items()}
    lost = [
        "dino_model.cls_token",
        "dino_model.storage_tokens",
        "dino_model.blocks.0.mlp.fc1.weight",
        "dino_model.patch_embed.cnn.3.conv.weight",
        "TEACHER_ONLY.patch_embed.proj.bias",
        "decoder.project_in.main.conv.weight",
        "decoder.stages.1.op_list.1.main.conv2.norm.weight",
    ]
    for key in lost:
        del shapes[key]
    shapes |= {"dino_model.norm.bias": (7,), "decoder.head.weight": (1,)}
    found = complaints("dinosae", shapes)
    assert {line for line in found if line.startswith("missing")} == {f"missing: {k}" for k in lost}
    assert "unexpected: decoder.head.weight" in found
    assert any(line.startswith("misshapen: dino_model.norm.bias [7]") for line in found)
    assert len(found) == len(lost) + 2
