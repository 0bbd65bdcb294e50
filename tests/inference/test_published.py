"""A converted RAE: its autoencoder, and flows that come without one, sampled and refused."""

import jax
import numpy as np
import pytest

from configs import export as export_config
from configs import rae_decoder, rae_dit
from dinosae_jax import rules
from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.inference.generator import Generator
from dinosae_jax.jobs import export
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.runtime import sharding
from dinosae_jax.weights import weight_source
from tests.weights_conversion import encoder_states as states
from tests.weights_conversion.layouts import save
from weights_conversion import convert
from weights_conversion.verification.golden import read_golden

SIDE, WIDTH = 4, 8  # of the recorded DiT^DH
FLOW = "generation_models/rae_ditdh/xl_flags_equal_width_no_s_projector.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data_dir):
    """Converted weights: an RAE of the recorded flow's latents, the flow, a weaker one."""
    root = tmp_path_factory.mktemp("rae")
    encoder, decoder, statistics = states.rae_files(SIDE, WIDTH)
    parts = {"encoder": encoder, "decoder": decoder, "stat": statistics}
    paths = {name: save(root / f"{name}.safetensors", state) for name, state in parts.items()}
    convert.convert_file("rae_autoencoder", list(paths.values()), root / "rae")
    convert.convert_file("rae_autoencoder", list(paths.values())[:2], root / "bare")
    other = save(root / "other.safetensors", {k: v[:, :2, :2] for k, v in statistics.items()})
    encoder_decoder = [paths["encoder"], paths["decoder"]]
    convert.convert_file("rae_autoencoder", [*encoder_decoder, other], root / "small")
    golden = read_golden(data_dir / FLOW)
    heads = {"dit": {"num_heads": golden.config["num_heads"], "num_classes": 10}}
    for name, weights, change in (
        ("flow", golden.weights, heads),
        ("weaker", golden.guidance_weights, {"dit": {"num_heads": [2, 3], "num_classes": 10}}),
    ):
        path = save(root / f"{name}.safetensors", weights)
        convert.convert_file("rae_ditdh", [path], root / name, overrides=change)
    return root


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, jax.devices()[:1])


def test_the_converted_autoencoder_encodes_and_decodes(folders, mesh):
    autoencoder = Autoencoder.load(folders / "rae", mesh=mesh)
    assert autoencoder.convention.tokens == SIDE**2
    assert autoencoder.convention.norm == "layernorm"
    assert autoencoder.convention.encoder.startswith("rae_dinov2")
    image = np.random.default_rng(0).uniform(size=(2, 16 * SIDE, 16 * SIDE, 3)).astype(np.float32)
    z = autoencoder.encode(image)
    assert z.shape == (2, SIDE**2, WIDTH)
    np.testing.assert_allclose(z.mean(axis=-1), 0, atol=1e-5)  # of a norm without scale and bias
    np.testing.assert_allclose(z, autoencoder.encode_teacher(image), atol=1e-5)
    assert autoencoder.decode(z).shape == image.shape
    with pytest.raises(ValueError, match="a ViT decoder has one grid, 4 tokens a side; got a grid"):
        autoencoder.decode(z[:, :8], grid=(2, 4))


@pytest.mark.slow
def test_a_converted_flow_is_sampled_with_every_guidance(folders, mesh, tmp_path):
    flow = Generator.load(folders / "flow", mesh=mesh, autoencoder=folders / "rae")
    assert flow.networks.path == "linear"
    assert flow.networks.end == 0.001
    assert flow.sampling["steps"] == 49
    key = jax.random.PRNGKey(0)
    draw = {"key": key, "steps": 3, "batch_size": 2}
    images = flow.sample([1, 2], **draw)
    assert images.shape == (2, 16 * SIDE, 16 * SIDE, 3)
    assert np.isfinite(images).all()
    guided = flow.sample([1, 2], guidance=2.0, **draw)
    weaker = Generator.load(folders / "weaker", mesh=mesh, autoencoder=folders / "rae")
    away = flow.guided_by(weaker).sample([1, 2], guidance=1.42, **draw)
    assert len({array.tobytes() for array in (images, guided, away)}) == 3

    config = export_config.get_config()
    config.update(dict(init_from=str(folders / "flow"), autoencoder=str(folders / "rae")))
    config.permissive = False
    rules.validate(config)
    export.run(config, tmp_path / "export")
    source = weight_source.open_weights(tmp_path / "export")
    assert source.weights["dit"]["licence"] == source.weights["decoder"]["licence"] == "MIT"
    assert set(source.weights) == {"stem", "vit", "decoder", "dit"}
    again = Generator.load(tmp_path / "export", mesh=mesh)
    np.testing.assert_array_equal(again.sample([1, 2], **draw), images)


@pytest.mark.parametrize(
    ("autoencoder", "message"),
    [
        ("", "a converted flow needs the autoencoder that it was trained on; got .*flow alone"),
        ("bare", "latents that are normalised by statistics; got .*bare without any"),
        ("small", r"the grid of the flow, 4 x 4; got \[2, 2\] in .*small"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(folders, mesh, autoencoder, message):
    given = folders / autoencoder if autoencoder else ""
    with pytest.raises(ValueError, match=message) as error:
        Generator.load(folders / "flow", mesh=mesh, autoencoder=given)
    assert "\n" not in str(error.value)


def test_latents_of_two_preprocessings_do_not_mix(folders):
    source = weight_source.open_weights(folders / "rae")
    config = rae_dit.get_config()
    config.init_from = str(folders / "rae")
    lines = weight_source.adopt_model(config, ())
    assert "model.vit.embed_dim: 768 -> 8" in lines
    assert config.data.image_size == 16 * SIDE
    model = config.model.to_dict()
    convention = LatentConvention.of(config)
    roles = ("stem", "vit", "decoder")
    weight_source.check_agreement(source, model, convention, roles)
    model["encoder"] = "raev2_dinov2"
    with pytest.raises(ValueError, match=r"model\.encoder: 'raev2_dinov2' here, 'rae"):
        weight_source.check_agreement(source, model, convention, roles)


def test_frozen_weights_of_another_encoder_are_refused(folders, tmp_path):
    path = save(tmp_path / "a.safetensors", states.facebook())
    convert.convert_file("dinov2", [path], tmp_path / "dinov2")
    config = rae_decoder.get_config("siglip2_vitb16")
    with pytest.raises(ValueError, match=r"encoder of the config, 'siglip2', .* got .*--kind=dino"):
        weight_source.load_frozen("vit", str(tmp_path / "dinov2"), config.model)
    config = rae_decoder.get_config("dinov2_vits14_reg")
    with pytest.raises(ValueError, match=r"one architecture; got .*model.vit.embed_dim: 384 here"):
        weight_source.load_frozen("vit", str(tmp_path / "dinov2"), config.model)


def test_blocks_above_the_last_layer_that_is_read_are_left_out(tmp_path):
    path = save(tmp_path / "a.safetensors", states.facebook())
    metadata = convert.convert_file("dinov2", [path], tmp_path / "dinov2")
    config = rae_decoder.get_config("dinov2_vits14_reg")
    config.model.vit.update(metadata["config"]["vit"])
    config.model.vit.layers = (0,)
    loaded = weight_source.load_frozen("vit", str(tmp_path / "dinov2"), config.model)
    assert loaded["params"]["blocks"]["norm1"]["scale"].shape == (1, states.WIDTH)
