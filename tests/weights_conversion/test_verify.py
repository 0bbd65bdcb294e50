"""verify: our modules through our tables against recorded activations."""

import dataclasses

import numpy as np
import pytest

from tests.weights_conversion import layouts
from weights_conversion import verify
from weights_conversion.readers.safetensors_file import read_safetensors, write_safetensors
from weights_conversion.verification.golden import read_golden

CASES = [
    ("dinosae", "autoencoder/e_autoencoder"),
    ("rae_lightningdit", "generation_models/rae_lightningdit/qk1_sw1_ro1_rm0"),
]
# Of these, tests/parity compares the same recordings in the fast suite.
MORE_CASES = [
    ("dinov3", "autoencoder/c_dinov3_mlp"),
    ("dinov3", "autoencoder/c_dinov3_swiglu"),
    ("dcae_decoder", "autoencoder/f_dcae_original"),
    ("lightningdit", "generation_models/orig_lightningdit/qk1_sw0_ro0_rm1_ws1"),
    ("rae_ditdh", "generation_models/rae_ditdh/xl_flags_equal_width_no_s_projector"),
]
KINDS = {
    "a_": "dinosae_stem",
    "b": "dinosae_decoder",
    "c_": "dinov3",
    "d_": "dinov3",
    "e_": "dinosae",
    "f_": "dcae_decoder",
}
FOLDERS = {
    "orig_lightningdit": "lightningdit",
    "rae_lightningdit": "rae_lightningdit",
    "rae_ditdh": "rae_ditdh",
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_recordings_are_reproduced(data_dir, kind, name, capsys):
    path = data_dir / f"{name}.safetensors"
    status = verify.main([f"--kind={kind}", f"--golden={path}"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, lines
    golden = read_golden(path)
    assert len(lines) == len(golden.outputs) + len(golden.intermediates) + 1
    assert all(line.startswith("ok") for line in lines[:-1])


def changed(golden, key):
    weights = {k: v.copy() for k, v in golden.weights.items()}
    weights[key].flat[0] += 0.1
    return dataclasses.replace(golden, weights=weights)


def test_a_changed_weight_is_found(data_dir):
    golden = read_golden(data_dir / "autoencoder" / "c_dinov3_mlp.safetensors")
    lines, good = verify.verify("dinov3", changed(golden, "blocks.1.mlp.fc2.weight"))
    assert not good
    # What lies before the change is still right.
    by_name = {line.split()[1]: line.split()[0] for line in lines}
    assert by_name["ns.tokens_in"] == by_name["ns.block0.out"] == "ok"
    assert by_name["ns.x_norm_patchtokens"] == by_name["ns.x_prenorm"] == "FAIL"


def test_the_stored_key_bias_does_not_matter(data_dir):
    golden = read_golden(data_dir / "autoencoder" / "c_dinov3_mlp.safetensors")
    width = golden.config["embed_dim"]
    weights = {k: v.copy() for k, v in golden.weights.items()}
    for i in range(golden.config["depth"]):
        weights[f"blocks.{i}.attn.qkv.bias"][width : 2 * width] = 7
        weights[f"blocks.{i}.attn.qkv.bias_mask"][:] = np.nan  # never filled: counts as absent
    only = {"ns.x_norm_patchtokens": golden.outputs["ns.x_norm_patchtokens"]}
    inputs = {"ns": golden.inputs["ns"]}
    golden = dataclasses.replace(golden, weights=weights, outputs=only, inputs=inputs)
    assert verify.verify("dinov3", golden)[1]


def test_hugging_face_and_timm_agree_with_facebook(data_dir):
    weights, golden = layouts.facebook(data_dir)
    only = {"ns.x_norm_patchtokens": golden.outputs["ns.x_norm_patchtokens"]}
    inputs = {"ns": golden.inputs["ns"]}
    for state in (layouts.hugging_face(weights, newer=True), layouts.timm(weights, qkvb=True)):
        recording = dataclasses.replace(golden, weights=state, outputs=only, inputs=inputs)
        assert verify.verify("dinov3", recording)[1]


def test_prefixes_of_training_scripts_are_known(data_dir):
    golden = read_golden(data_dir / "autoencoder" / "f_dcae_original.safetensors")
    weights = {f"module.{key}": value for key, value in golden.weights.items()}
    assert verify.verify("dcae_decoder", dataclasses.replace(golden, weights=weights))[1]


def test_a_recording_without_what_its_outputs_need_is_an_error(tmp_path, data_dir, capsys):
    name = "generation_models/orig_lightningdit/qk1_sw0_ro0_rm1_ws1.safetensors"
    tensors, metadata = read_safetensors(data_dir / name)
    kept = {key: tensor for key, tensor in tensors.items() if key != "inputs/cfg_scale"}
    entries = [(k, str(v.dtype), v.shape, lambda v=v: np.asarray(v)) for k, v in kept.items()]
    write_safetensors(tmp_path / "a.safetensors", entries, metadata)
    assert verify.main(["--kind=lightningdit", f"--golden={tmp_path / 'a.safetensors'}"]) == 1
    assert (
        "a recording has the inputs of its outputs; got none called 'cfg_scale'"
        in capsys.readouterr().err
    )


def test_a_twin_gives_the_inputs(tmp_path, data_dir, capsys):
    twin = data_dir / "autoencoder" / "f_dcae_original.safetensors"
    renamed = layouts.diffusers(read_golden(twin).weights)
    path = layouts.save(tmp_path / "a.safetensors", {f"params.{k}": v for k, v in renamed.items()})
    assert verify.main(["--kind=dcae_decoder", f"--golden={path}"]) == 1
    assert "--reference" in capsys.readouterr().err
    assert verify.main(["--kind=dcae_decoder", f"--golden={path}", f"--reference={twin}"]) == 0


def test_a_configuration_that_disagrees_with_the_weights_is_an_error(data_dir, capsys):
    golden = read_golden(data_dir / "autoencoder" / "c_dinov3_mlp.safetensors")
    golden = dataclasses.replace(golden, config=golden.config | {"depth": 3})
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.norm1\.weight"):
        verify.verify("dinov3", golden)
    path = data_dir / "generation_models" / "rae_lightningdit" / "qk1_sw1_ro1_rm0.safetensors"
    assert verify.main(["--kind=lightningdit", f"--golden={path}"]) == 1
    assert "unexpected: t_embedder.W" in capsys.readouterr().err


def test_not_a_number_and_wrong_shapes_fail():
    recorded = np.zeros((2, 3))
    assert verify.compare("v", recorded, np.zeros((2, 3)), True)[1]
    assert not verify.compare("v", recorded, np.full((2, 3), np.nan), True)[1]
    assert not verify.compare("v", recorded, np.zeros((3, 2)), True)[1]
    assert not verify.compare("v", recorded, None, True)[1]
    assert verify.compare("inside", recorded, None, False)[1]


def test_every_recorded_autoencoder_case(golden_dir):
    twin = golden_dir / "autoencoder" / "f_dcae_original.safetensors"
    paths = sorted((golden_dir / "autoencoder").glob("*.safetensors"))
    assert len(paths) >= 13
    for path in paths:
        kind = next(kind for prefix, kind in KINDS.items() if path.name.startswith(prefix))
        lines, good = verify.verify(kind, read_golden(path, twin))
        assert good, (path.name, lines)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_recorded_generation_case(golden_dir, folder):
    paths = sorted((golden_dir / "generation" / folder).glob("*.safetensors"))
    assert paths
    for path in paths:
        lines, good = verify.verify(FOLDERS[folder], read_golden(path))
        assert good, (path.name, lines)
