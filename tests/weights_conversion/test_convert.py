"""Convert and export: every layout there and back bitwise, containers, bad input."""

import collections
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from dinosae_jax.weights import conversion
from tests.models.metrics_weights import efficientnet_state
from tests.weights_conversion import layouts
from tests.weights_conversion.layouts import save
from tests.weights_conversion.torch_zip import write_torch
from weights_conversion import convert, export
from weights_conversion.mapping import MismatchError
from weights_conversion.readers import containers
from weights_conversion.readers.safetensors_file import read_safetensors
from weights_conversion.readers.stored import RefusedFileError
from weights_conversion.verification.golden import read_golden


def assert_round_trip(tmp_path, kind, source, expected, **options):
    """Converts a file and exports it; the tensors must be `expected`, bitwise and in order."""
    metadata = convert.convert_file(kind, [source], tmp_path / "out", **options)
    export.export_directory(kind, tmp_path / "out", tmp_path / "back.safetensors")
    back, _ = read_safetensors(tmp_path / "back.safetensors")
    assert list(back) == list(expected)
    for key, value in expected.items():
        assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape), key
        assert np.asarray(back[key]).tobytes() == value.tobytes(), key
    return metadata


def recorded(data_dir, path):
    return read_golden(data_dir / f"{path}.safetensors").weights


@pytest.mark.parametrize(
    ("kind", "name", "layout"),
    [
        ("dinov3", "autoencoder/c_dinov3_mlp", "facebook"),
        ("dinov3", "autoencoder/c_dinov3_swiglu", "facebook"),
        ("dinosae", "autoencoder/e_autoencoder", "official"),
        ("dcae_decoder", "autoencoder/f_dcae_original", "efficientvit"),
        ("lightningdit", "generation_models/orig_lightningdit/xl_flags_patch2", "LightningDiT"),
        ("rae_lightningdit", "generation_models/rae_lightningdit/qk1_sw1_ro1_rm0", "LightningDiT"),
        (
            "rae_ditdh",
            "generation_models/rae_ditdh/xl_flags_equal_width_no_s_projector",
            "DiT^DH",
        ),
    ],
)
def test_recorded_weights_round_trip(tmp_path, data_dir, kind, name, layout):
    state = recorded(data_dir, name)
    source = save(tmp_path / "a.safetensors", state)
    assert assert_round_trip(tmp_path, kind, source, state)["layout"] == layout


@pytest.mark.parametrize("newer", [False, True])
def test_hugging_face_layouts_round_trip(tmp_path, data_dir, newer):
    facebook, _ = layouts.facebook(data_dir)
    state = layouts.hugging_face(facebook, newer)
    source = save(tmp_path / "a.safetensors", state)
    metadata = assert_round_trip(tmp_path, "dinov3", source, state)
    assert metadata["layout"] == ("huggingface_model_layer" if newer else "huggingface")
    assert metadata["derived"] == ["vit/params/rope_embed/periods"]


@pytest.mark.parametrize("qkvb", [False, True])
def test_timm_layouts_round_trip(tmp_path, data_dir, qkvb):
    facebook, _ = layouts.facebook(data_dir)
    state = layouts.timm(facebook, qkvb)
    source = save(tmp_path / "a.safetensors", state)
    metadata = assert_round_trip(tmp_path, "dinov3", source, state)
    assert metadata["layout"] == "timm"
    assert metadata["config"]["vit"]["qkv_bias"] == qkvb


def test_diffusers_layout_equals_efficientvits(tmp_path, data_dir):
    state = recorded(data_dir, "autoencoder/f_dcae_original")
    renamed = layouts.diffusers(state)
    for name, tensors in (("a", state), ("b", renamed)):
        source = save(tmp_path / f"{name}.safetensors", tensors)
        convert.convert_file("dcae_decoder", [source], tmp_path / name)
    assert_round_trip(tmp_path, "dcae_decoder", tmp_path / "b.safetensors", renamed)
    first, second = conversion.load(tmp_path / "a"), conversion.load(tmp_path / "b")
    assert first.config == second.config
    kernel = ("stages_0", "op_list_0", "context_module", "main", "qkv", "conv", "kernel")
    for loaded in (first, second):
        leaf = loaded.params["decoder"]
        for part in kernel:
            leaf = leaf[part]
        assert leaf.shape == (1, 1, 64, 192)
    np.testing.assert_array_equal(
        leaf[0, 0].T,
        state["decoder.stages.4.op_list.0.context_module.main.qkv.conv.weight"][..., 0, 0],
    )


def test_the_four_layouts_of_dinov3_give_the_same_tree(tmp_path, data_dir):
    facebook, _ = layouts.facebook(data_dir)
    states = [facebook, layouts.hugging_face(facebook), layouts.timm(facebook, True)]
    trees = []
    for i, state in enumerate(states):
        source = save(tmp_path / f"{i}.safetensors", state)
        options = {"overrides": {"vit": {"num_heads": 4}}}
        convert.convert_file("dinov3", [source], tmp_path / str(i), **options)
        trees.append(conversion.load(tmp_path / str(i)).params["vit"])
    for tree in trees[1:]:
        np.testing.assert_array_equal(
            tree["blocks"]["attn"]["qkv"]["bias"], trees[0]["blocks"]["attn"]["qkv"]["bias"]
        )
        np.testing.assert_allclose(
            tree["rope_embed"]["periods"], facebook["rope_embed.periods"], rtol=2e-7
        )


def test_periods_can_be_rounded_as_in_facebooks_files(tmp_path, data_dir):
    facebook, _ = layouts.facebook(data_dir, "c_dinov3_swiglu")
    source = save(tmp_path / "a.safetensors", layouts.hugging_face(facebook_gated(facebook)))
    options = {"overrides": {"vit": {"num_heads": 3}}, "round_periods_to_bf16": True}
    metadata = convert.convert_file("dinov3", [source], tmp_path / "out", **options)
    assert metadata["round_periods_to_bf16"]
    periods = conversion.load(tmp_path / "out").params["vit"]["rope_embed"]["periods"]
    np.testing.assert_array_equal(periods, facebook["rope_embed.periods"])


def facebook_gated(state):
    """SwiGLU's names of Hugging Face for w1, w2, w3."""
    names = {"mlp.w1.": "mlp.gate_proj.", "mlp.w2.": "mlp.up_proj.", "mlp.w3.": "mlp.down_proj."}
    found = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)  # noqa: PLW2901
        found[key] = value
    return found


def test_half_precision_stays_on_disk_and_loads_as_float32(tmp_path, data_dir):
    state, _ = layouts.facebook(data_dir)
    state = {
        k: v.astype(np.float16 if "blocks" in k else ml_dtypes.bfloat16) for k, v in state.items()
    }
    source = write_torch(tmp_path / "a.pth", {"model": collections.OrderedDict(state)})
    expected = {f"model.{key}": value for key, value in state.items()}
    assert_round_trip(tmp_path, "dinov3", source, expected)
    stored = conversion.restore(tmp_path / "out", conversion.read_metadata(tmp_path / "out"))
    assert stored["vit"]["params"]["blocks"]["attn"]["qkv"]["kernel"].dtype == np.float16
    assert stored["vit"]["params"]["norm"]["scale"].dtype == ml_dtypes.bfloat16
    vit = conversion.load(tmp_path / "out").params["vit"]
    assert vit["norm"]["scale"].dtype == vit["blocks"]["norm1"]["bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("asked", "prefix", "left"),
    [
        (None, "ema.module.", ["model (state dict)", "epoch"]),
        ("model", "model.", ["ema (state dict)", "epoch"]),
    ],
)
def test_containers(tmp_path, data_dir, asked, prefix, left):
    state, _ = layouts.facebook(data_dir)
    saved = {
        "model": {key: value + 1 for key, value in state.items()},
        "ema": {f"module.{key}": value for key, value in state.items()},
        "epoch": 3,
    }
    source = write_torch(tmp_path / "a.pth", saved)
    chosen = saved["ema"] if asked is None else saved["model"]
    container = prefix.split(".")[0]
    expected = {f"{container}.{key}": value for key, value in chosen.items()}
    metadata = assert_round_trip(tmp_path, "dinov3", source, expected, container=asked)
    assert metadata["files"][0]["container"] == prefix
    assert metadata["files"][0]["left"] == left
    # What export wrote is a file that convert reads in the same way.
    again = tmp_path / "back.safetensors"
    again = assert_round_trip(
        tmp_path, "dinov3", again.rename(tmp_path / "b.safetensors"), expected
    )
    assert again["files"][0]["container"] == prefix


def test_containers_are_named_when_none_is_preferred(tmp_path):
    saved = {"student": {"a": np.ones(2)}, "teacher": {"a": np.ones(2)}}
    path = write_torch(tmp_path / "a.pth", saved)
    with pytest.raises(RefusedFileError, match="student, teacher; name one with --container"):
        containers.read([path])
    with pytest.raises(RefusedFileError, match="no container 'ema', it has 'student', 'teacher'"):
        containers.read([path], container="ema")
    assert containers.read([path], container="teacher")[0].prefix == "teacher."


@pytest.mark.parametrize(
    "value", [{0: np.ones(2, "f4")}, {"a\nb": np.ones(2, "f4")}, {"k" * 1001: np.ones(2, "f4")}]
)
def test_names_that_are_no_printable_strings_are_refused(tmp_path, value):
    path = write_torch(tmp_path / "a.pth", value)
    with pytest.raises(RefusedFileError, match="got a tensor named") as caught:
        containers.read([path])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_dictionary_under_many_names_is_visited_once(tmp_path):
    # In itself 3000 times: looking three levels deep without a memory would take 3000^3 steps.
    names = b"".join(b"X\x04\x00\x00\x00%04dh\x00" % i for i in range(3000))
    path = write_torch(tmp_path / "a.pth", {}, pickle=b"\x80\x02}q\x00(" + names + b"u.")
    with pytest.raises(RefusedFileError, match="no tensors"):
        containers.read([path])


def test_discriminator_from_two_files(tmp_path, data_dir):
    recording = np.load(data_dir / "metrics_models" / "disc_tiny.npz")
    parts = [
        {k.split("/", 1)[1]: recording[k] for k in recording.files if k.startswith(f"{group}/")}
        for group in ("backbone", "disc0")
    ]
    files = [save(tmp_path / f"{i}.safetensors", state) for i, state in enumerate(parts)]
    metadata = convert.convert_file("dino_discriminator", files, tmp_path / "out")
    assert set(metadata["config"]) == {"dino", "disc_heads"}
    loaded = conversion.load(tmp_path / "out")
    heads = loaded.variables["disc_heads"]
    kernel = parts[1]["heads.1.1.fn.0.weight_orig"]
    np.testing.assert_array_equal(
        heads["params"]["heads_1_1"]["fn_0"]["kernel"], kernel.transpose(2, 1, 0)
    )
    u = heads["spectral"]["heads_1_1"]["fn_0"]["u"]
    np.testing.assert_array_equal(u, parts[1]["heads.1.1.fn.0.weight_u"])
    export.export_directory("dino_discriminator", tmp_path / "out", tmp_path / "b.safetensors")
    back, _ = read_safetensors(tmp_path / "b.safetensors")
    for key, value in (parts[0] | parts[1]).items():
        assert np.asarray(back[key]).tobytes() == value.tobytes()


def vgg(prefix):
    """VGG16 as torchvision or an lpips module names it; each layer is filled with its index."""
    widths = [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    slices = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    state, channels = {}, 3
    for index, number, width in zip(indices, slices, widths, strict=True):
        name = f"features.{index}" if prefix == "features" else f"net.slice{number}.{index}"
        state[f"{name}.weight"] = np.full((width, channels, 3, 3), index, np.float16)
        state[f"{name}.bias"] = np.full(width, index, np.float16)
        channels = width
    return state


@pytest.mark.parametrize("prefix", ["features", "net"])
def test_lpips(tmp_path, data_dir, prefix):
    recording = np.load(data_dir / "metrics_models" / "lpips.npz")
    heads = {k.removeprefix("lin/"): recording[k] for k in recording.files if k.startswith("lin/")}
    others = {"classifier.0.weight": np.ones((2, 2))} if prefix == "features" else {}
    state = {**vgg(prefix), **heads, **others}
    assert_round_trip(tmp_path, "lpips_vgg16", save(tmp_path / "a.safetensors", state), state)
    lpips = conversion.load(tmp_path / "out").params["lpips"]
    assert lpips["features_17"]["kernel"].shape == (3, 3, 256, 512)
    assert lpips["features_17"]["kernel"][0, 0, 0, 0] == 17
    np.testing.assert_array_equal(
        lpips["lin2"]["model_1"]["kernel"][0, 0], heads["lin2.model.1.weight"][0, :, 0]
    )


@pytest.mark.slow  # in the fast suite: of its features, in test_inception
def test_inception(tmp_path, data_dir):
    recording = np.load(data_dir / "metrics_models" / "inception_fullshape.npz")
    shapes = [
        tuple(map(int, str(s).strip("()[] ,").replace("x", ",").split(",")))
        for s in recording["shapes"]
    ]
    state = {
        str(key): np.zeros(shape, np.float16)
        for key, shape in zip(recording["keys"], shapes, strict=True)
    }
    state["Mixed_7c.branch_pool.bn.running_var"] += 3
    assert_round_trip(tmp_path, "inception_fid", save(tmp_path / "a.safetensors", state), state)
    loaded = conversion.load(tmp_path / "out").variables["inception"]
    assert loaded["batch_stats"]["Mixed_7c"]["branch_pool"]["bn"]["var"][0] == 3


@pytest.mark.slow
def test_efficientnet(tmp_path):
    state = efficientnet_state()
    source = write_torch(tmp_path / "a.pth", collections.OrderedDict(state))
    metadata = assert_round_trip(tmp_path, "efficientnet_lite0", source, state)
    assert sum(t["target"].startswith("buffers/") for t in metadata["tensors"]) == 49
    loaded = conversion.load(tmp_path / "out").variables["efficientnet"]
    depthwise = loaded["params"]["_blocks_3"]["_depthwise_conv"]["kernel"]
    expected = state["_blocks.3._depthwise_conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(depthwise, expected)
    variance = loaded["batch_stats"]["_blocks_0"]["_bn1"]["var"]
    np.testing.assert_array_equal(variance, state["_blocks.0._bn1.running_var"])


def test_another_efficientnet_is_refused(tmp_path):
    state = efficientnet_state()
    state["_blocks.0._se_reduce.weight"] = np.ones((8, 32, 1, 1), np.float32)
    del state["_blocks.15._bn2.running_mean"]
    source = save(tmp_path / "a.safetensors", state)
    with pytest.raises(MismatchError) as caught:
        convert.convert_file("efficientnet_lite0", [source], tmp_path / "out")
    assert "missing: _blocks.15._bn2.running_mean" in str(caught.value)
    assert "unexpected: _blocks.0._se_reduce.weight" in str(caught.value)


def test_wrong_keys_are_listed_and_nothing_is_written(tmp_path, data_dir):
    state, _ = layouts.facebook(data_dir)
    del state["blocks.1.norm2.bias"]
    state["head.weight"] = np.ones(2)
    state["norm.weight"] = np.ones(5)
    source = save(tmp_path / "a.safetensors", state)
    with pytest.raises(MismatchError) as caught:
        convert.convert_file("dinov3", [source], tmp_path / "out")
    for key in (
        "missing: blocks.1.norm2.bias",
        "unexpected: head.weight",
        "misshapen: norm.weight",
    ):
        assert key in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, data_dir, capsys):
    state, _ = layouts.facebook(data_dir)
    source = str(save(tmp_path / "a.safetensors", state))
    out, back = str(tmp_path / "out"), str(tmp_path / "back.safetensors")
    for _ in range(2):  # an earlier conversion is replaced
        assert convert.main(["--kind=dinov3", f"--input={source}", f"--output={out}"]) == 0
    assert "layout facebook" in capsys.readouterr().out
    assert export.main(["--kind=dinov3", f"--input={out}", f"--output={back}"]) == 0
    metadata = json.loads((tmp_path / "out" / "conversion.json").read_text())
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert (
        metadata["files"][0] | {"name": "a.safetensors", "sha256": digest} == metadata["files"][0]
    )


def test_bad_commands_say_what_is_wrong_in_a_line(tmp_path, data_dir, capsys):
    state, _ = layouts.facebook(data_dir)
    source = str(save(tmp_path / "a.safetensors", state))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    out = f"--output={tmp_path / 'out'}"
    cases = [
        (["--kind=dinov3", "--input=/nowhere.pth", out], "there is no file"),
        (["--kind=lightningdit", f"--input={source}", out], "this is no LightningDiT"),
        (["--kind=dinosae", f"--input={source}", out], "dino_model."),
        (["--kind=dinov3", f"--input={source}", f"--output={tmp_path / 'full'}"], "something else"),
        (["--kind=dinov3", f"--input={source}", f"--output={source}"], "which is a file"),
        (["--kind=dinov3", f"--input={source}", out, "--container=ema"], "no container 'ema'"),
        (["--kind=dinov3", f"--input={source}", out, "--round_periods_to_bf16"], "leave it out"),
        (["--kind=dinov3", f"--input={source},{source}", out], "repeats 38 keys"),
        (["--kind=dinov3", f"--input={source}", out, '--config={"dit": {}}'], "roles vit"),
        (["--kind=dinov3", f"--input={source}", out, '--config={"vit": 3}'], "is a dictionary"),
        *(
            (["--kind=dinov3", f"--input={source}", out, f'--config={{"vit": {fields}}}'], says)
            for fields, says in [
                ('{"head": 1}', "no vit can be built from"),
                ('{"num_heads": 0}', "check --config"),
                ('{"embed_dim": "wide"}', "check --config"),
                ('{"ffn_layer": "relu"}', "ffn_layer is one of mlp"),
            ]
        ),
        (["--kind=dinov3", f"--input={source}", f"--output={source}/x/y"], "Not a directory"),
    ]
    for arguments, says in cases:
        assert convert.main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    assert (tmp_path / "full" / "thesis.tex").exists()
    assert export.main(["--kind=dinov3", f"--input={tmp_path}", "--output=a.safetensors"]) == 1
    assert "no converted weights" in capsys.readouterr().err
    convert.main(["--kind=dinov3", f"--input={source}", out])
    assert export.main(["--kind=dinosae", f"--input={tmp_path / 'out'}", "--output=a.x"]) == 1
    assert "is of kind dinov3" in capsys.readouterr().err


def test_a_name_that_claims_a_hash_is_checked(tmp_path, data_dir):
    state, _ = layouts.facebook(data_dir)
    path = write_torch(tmp_path / "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", state)
    with pytest.raises(RefusedFileError, match=r"claims sha256 8aa4cbdd.*dinov3_vitl16 \(LVD"):
        convert.convert_file("dinov3", [path], tmp_path / "out")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f"mine-{digest[:8]}.pth")
    assert containers.sha256(path) == digest


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "truncated"),
        ((9).to_bytes(8, "little") + b"[1, 2, 3]", "not a dictionary"),
        ((3).to_bytes(8, "little") + b"{{{", "not JSON"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "damaged"),
        ((20).to_bytes(8, "little") + b'{"__metadata__": []}', "metadata is not a dictionary"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, data, says):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(RefusedFileError, match=says):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "does not fit"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "does not fit"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "overlap or leave gaps"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "longer than its tensors"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "F99"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "not supported"),
        ({"dtype": "F32", "shape": [2, *[1] * 99], "data_offsets": [0, 8]}, "does not fit"),
        ({"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}, "does not fit"),
    ],
)
def test_safetensors_windows_are_checked(tmp_path, entry, says):
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(RefusedFileError, match=says):
        read_safetensors(path)
