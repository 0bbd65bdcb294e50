"""Every encoder family in a stage and a flow: one grid, its widths, its reading, its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rae_decoder, rae_dit, rfm_dit, sae_stage1
from dinosae_jax import encoders, rules
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.models import autoencoder
from tests.tiny import SMALLEST

FAMILIES = ("dinov2_vits14", "siglip2_vitb16", "mae_vitb16", "eupe_vits16", "rae_dinov2_vitb14_reg")
SIZES = {k: v for k, v in SMALLEST.items() if k != "model.vit.num_storage_tokens"}


def smallest(network, **changes):
    config = sae_stage1.get_config(f"{network},tiny")
    config.update_from_flattened_dict({**SIZES, **changes})
    rules.validate(config)
    return config


def through(network):
    """Images -> tokens of student and teacher, the teacher's class token, images again."""
    modules = autoencoder.build(smallest(network).model.to_dict())

    def run(images):
        variables = autoencoder.init(modules, jax.random.key(0), 32)
        student = autoencoder.encode(modules, variables, images)
        teacher = autoencoder.encode_teacher(modules, variables, images)
        decoded = autoencoder.decode(modules, variables, student.tokens, (3, 2))
        return student.tokens, teacher.tokens, teacher.cls, decoded

    return run


@pytest.mark.parametrize("network", FAMILIES)
def test_student_and_teacher_share_the_grid_of_any_image(network):
    images = jax.ShapeDtypeStruct((1, 48, 32, 3), jnp.float32)
    student, teacher, cls, decoded = jax.eval_shape(through(network), images)
    assert student.shape == teacher.shape == (1, 6, 32)
    assert cls.shape == (1, 32)
    assert decoded.shape == images.shape


@pytest.mark.slow
@pytest.mark.parametrize("network", FAMILIES)
def test_tokens_of_student_and_teacher_are_finite(network):
    images = np.random.default_rng(0).uniform(size=(1, 48, 32, 3)).astype(np.float32)
    student, teacher, *_ = jax.jit(through(network))(images)
    assert np.isfinite(student).all()
    assert np.isfinite(teacher).all()


@pytest.mark.parametrize("network", encoders.NETWORKS)
def test_published_networks_are_variants_of_stages_and_flows(network):
    stage, flow = sae_stage1.get_config(network), rfm_dit.get_config(network)
    rules.validate(stage)
    rules.validate(flow)
    family, size = encoders.NETWORKS[network]
    width = size["embed_dim"]
    assert stage.model.stem.embed_dim == stage.model.decoder.latent_channels == width
    assert flow.model.dit.in_channels == width
    assert stage.model.get("encoder", "dinov3") == family
    reading = LatentConvention.of(stage).encoder
    assert reading.startswith("" if family == "dinov3" else family)
    assert LatentConvention.from_dict(LatentConvention.of(flow).to_dict()).encoder == reading


def test_a_config_around_dinov3_is_what_it_was():
    plain, named = sae_stage1.get_config(), sae_stage1.get_config("dinov3_vitl16")
    assert plain.to_dict() == named.to_dict()
    assert "encoder" not in plain.model
    assert "encoder" not in LatentConvention.of(plain).to_dict()


def test_raes_numbers():
    flow, decoder = rae_dit.get_config(), rae_decoder.get_config()
    rules.validate(flow)
    rules.validate(decoder)
    assert flow.flow.path == "linear"
    assert flow.model.dit.in_channels == 768
    assert decoder.model.stem.to_dict() == {"kind": "patch", "embed_dim": 768, "patch_size": 14}
    assert decoder.model.vit.final_norm == "plain"
    assert tuple(decoder.trainable) == ("decoder",)


WRONG = [
    ({"model.vit.layers": (1, 0)}, "layers are increasing block numbers"),
    ({"model.vit.layers": (7,)}, r"got \(7,\) of 1 blocks"),
    ({"model.vit.table_side": 0}, r"got table_side=0 with positions='learned'"),
    ({"model.encoder": "dino2"}, "did you mean 'dinov2'"),
    ({"model.vit.positions": "learnt"}, "did you mean 'learned'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        smallest("dinov2_vits14", **changes)
    assert "\n" not in str(error.value)


def test_a_vit_decoder_has_the_grid_of_its_images():
    config = rae_decoder.get_config("tiny")
    config.data.image_size = 96
    with pytest.raises(ValueError, match=r"6 tokens of 16 pixels .* got grid=4 .*grid=6"):
        rules.validate(config)


@pytest.mark.slow
def test_layers_are_read_one_or_several():
    vit = {"embed_dim": 16, "depth": 3, "num_heads": 2, "ffn_hidden": 32}
    module = autoencoder.registry.build("vit", vit)
    patches = np.random.default_rng(0).normal(size=(1, 2, 2, 16)).astype(np.float32)
    variables = module.init(jax.random.key(0), patches)
    blocks = variables["params"]["blocks"]

    def read(**fields):
        own = module.clone(**fields)
        cut = jax.tree.map(lambda leaf: leaf[: own.run_depth], blocks)
        params = {"params": {**variables["params"], "blocks": cut}}
        return own.apply(params, patches).patches

    one, two, both, added, with_mean, last, whole = jax.jit(
        lambda: (
            read(layers=(0,)),
            read(layers=(1,)),
            read(layers=(0, 1)),
            read(layers=(0, 1), layer_sum=True),
            read(layers=(0, 1), token_mean=True),
            read(layers=(2,)),
            module.apply(variables, patches).patches,
        )
    )()
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-6)
    np.testing.assert_allclose(added, one + two, atol=1e-6)
    mean = two.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(with_mean, (one + two) / 2 + mean, atol=1e-6)
    np.testing.assert_array_equal(last, whole)
