"""Discriminator heads against recorded calls of the reference implementations."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.losses.adversarial import discriminator_loss, generator_loss
from dinosae_jax.models.dino_v1 import DinoV1
from dinosae_jax.models.discriminator import DiscriminatorHeads, LocalBatchNorm, SpectralConv
from dinosae_jax.sizes import DINO
from tests.models.metrics_weights import (
    flax_variables,
    group,
    relative_error,
    seeded_state,
    stack_blocks,
)
from tests.models.test_dino_v1 import TINY, dino_kind

TOLERANCE = 2e-5  # float32 logits against those recorded from RAE
HEADS = DiscriminatorHeads(num_heads=4, channels=32)
evaluate = jax.jit(functools.partial(HEADS.apply, train=False))


def nhwc(images):
    return images.transpose(0, 2, 3, 1)


def tokens_last(activations):
    return [np.asarray(a).transpose(0, 2, 1) for a in activations]


@pytest.fixture(scope="module")
def recording(data_dir):
    return np.load(data_dir / "metrics_models" / "disc_tiny.npz")


@pytest.fixture(scope="module")
def variables(recording):
    return flax_variables(group(recording, "disc0/"))


@pytest.fixture(scope="module")
def trunk(recording):
    params = stack_blocks(flax_variables(group(recording, "backbone/"))["params"])
    return functools.partial(jax.jit(DinoV1(**TINY).apply), {"params": params})


@pytest.fixture(scope="module")
def activations(recording, trunk):
    return {name: trunk(nhwc(recording[name])) for name in ("fake", "real")}


@pytest.fixture(scope="module")
def trained(variables, activations):
    """One discriminator call on fake, then real: (loss, (logits, logits, spectral)), gradients."""

    def loss_fn(params):
        spectral, logits = variables["spectral"], {}
        for name in ("fake", "real"):
            logits[name], updated = HEADS.apply(
                {"params": params, "spectral": spectral},
                activations[name], train=True, mutable=["spectral"],
            )  # fmt: skip
            spectral = updated["spectral"]
        return discriminator_loss(logits["real"], logits["fake"]), (logits, spectral)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])


def test_evaluation_logits_equal_recorded(recording, variables, activations):
    logits = evaluate(variables, activations["fake"])
    assert relative_error(logits, recording["logits_fake_eval"]) < TOLERANCE


def test_generator_gradient_reaches_the_images(recording, variables, trunk):
    def loss_fn(images):
        return generator_loss(HEADS.apply(variables, trunk(images), train=False))

    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(nhwc(recording["fake"]))
    assert relative_error(loss, recording["g_loss_eval"]) < TOLERANCE
    assert relative_error(gradient, nhwc(recording["dgloss_dfake_eval"])) < TOLERANCE


def test_training_call_equals_recorded(recording, trained):
    (loss, (logits, _)), _ = trained
    assert relative_error(loss, recording["d_loss_train"]) < TOLERANCE
    for name in ("fake", "real"):
        assert relative_error(logits[name], recording[f"logits_{name}_train"]) < TOLERANCE


def test_training_gradients_equal_recorded(recording, trained):
    gradients = trained[1]
    expected = flax_variables(group(recording, "grad_dloss/"))["params"]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def check(path, actual, expected):
        # A bias before a per-channel norm has gradient 0, which is rounding noise on both sides.
        error = np.abs(actual - expected).max()
        scale = max(np.abs(expected).max(), 0.1 * largest)
        assert error < TOLERANCE * scale, (jax.tree_util.keystr(path), error, scale)

    jax.tree_util.tree_map_with_path(check, gradients, expected)


def test_power_iteration_equals_recorded(recording, trained):
    spectral = trained[0][1][1]
    expected = flax_variables(group(recording, "disc_after_train/"))["spectral"]
    errors = jax.tree.map(relative_error, spectral, expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE


def test_evaluation_after_training_equals_recorded(
    recording, variables, trained, trunk, activations
):
    after = {"params": variables["params"], "spectral": trained[0][1][1]}
    logits = evaluate(after, activations["fake"])
    assert relative_error(logits, recording["logits_fake_eval_after"]) < TOLERANCE
    large = trunk(recording["img256_u8"] / np.float32(127.5) - 1)
    logits = evaluate(after, large)
    assert relative_error(logits, recording["logits_img256_eval_after"]) < TOLERANCE


def test_initial_variables_have_the_recorded_tree(variables):
    activations = [jax.ShapeDtypeStruct((1, 9, 32), jnp.float32)] * 4
    init = functools.partial(HEADS.init, train=False)
    created = jax.eval_shape(init, jax.random.key(0), activations)
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(jnp.shape, variables)


def test_init_converges_the_spectral_norm():
    conv = SpectralConv(features=48, kernel_size=9)
    init = jax.jit(lambda key: conv.init(key, jnp.zeros((1, 12, 48)), train=True))
    variables = init(jax.random.key(0))
    matrix = np.asarray(variables["params"]["kernel"]).transpose(2, 1, 0).reshape(48, -1)
    u, v = variables["spectral"]["u"], variables["spectral"]["v"]
    true = np.linalg.norm(matrix, ord=2)
    assert 0.95 * true < u @ matrix @ v <= true * (1 + 1e-6)


def test_an_image_does_not_depend_on_its_batch(variables, activations):
    both = evaluate(variables, activations["fake"])
    alone = evaluate(variables, [a[:1] for a in activations["fake"]])
    np.testing.assert_allclose(both[:1], alone, atol=1e-5 * np.abs(both).max())


def test_wrong_activations_are_refused():
    with pytest.raises(ValueError, match="take 4 activations of 32 channels"):
        HEADS.init(jax.random.key(0), [jnp.zeros((1, 9, 16))] * 4, train=False)


class StyleGanTHead(nn.Module):
    """StyleGAN-T's head, composed of our parts: virtual batches of 8 and a conditional readout."""

    classifier_features: int

    @nn.compact
    def __call__(self, x, condition, train):
        c = x.shape[-1]
        block = lambda x, conv, norm: nn.leaky_relu(norm(conv(x, train)), 0.2)  # noqa: E731
        norms = [LocalBatchNorm(8, 1e-5, name=name) for name in ("main_0_1", "main_1_fn_1")]
        x = block(x, SpectralConv(c, name="main_0_0"), norms[0])
        x = (x + block(x, SpectralConv(c, 9, name="main_1_fn_0"), norms[1])) / math.sqrt(2)
        logits = SpectralConv(self.classifier_features, name="cls")(x, train)
        if self.classifier_features > 1:
            mapped = nn.Dense(self.classifier_features, name="cmapper")(condition)
            logits = (logits * mapped[:, None, :]).sum(-1, keepdims=True) / 8
        return logits


@pytest.mark.parametrize("case", ["B8_c0", "B16_c0", "B4_c6"])
def test_style_gan_t_heads_equal_recorded(data_dir, case):
    recording = np.load(data_dir / "metrics_models" / "disc_stylegant_heads.npz")
    rename = lambda state: {k.replace(".1.fn.", "_1_fn."): v for k, v in state.items()}  # noqa: E731
    variables = flax_variables(rename(group(recording, f"{case}/sd/")))
    if "cmapper" in variables["params"]:  # that layer divides its weight by sqrt(inputs)
        variables["params"]["cmapper"]["kernel"] /= np.sqrt(recording[f"{case}/c"].shape[1])
    head = StyleGanTHead(variables["params"]["cls"]["bias"].shape[0])
    x, condition = recording[f"{case}/x"].transpose(0, 2, 1), recording[f"{case}/c"]

    train = jax.jit(lambda v: head.apply(v, x, condition, True, mutable=["spectral"]))
    output, updated = train(variables)
    assert relative_error(output[..., 0], recording[f"{case}/out_train"][:, 0]) < TOLERANCE
    expected = flax_variables(rename(group(recording, f"{case}/after/")))["spectral"]
    errors = jax.tree.map(relative_error, updated["spectral"], expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE
    output = jax.jit(lambda v: head.apply(v, x, condition, False))({**variables, **updated})
    assert relative_error(output[..., 0], recording[f"{case}/out_eval_after"][:, 0]) < TOLERANCE


def head_kind(name):
    if name.endswith("weight_orig"):
        return 1.0
    if ".0.1." in name or ".fn.1." in name:
        return "scale" if name.endswith("weight") else "shift"
    return "bias"


def test_full_size_logits_equal_recorded(golden_dir):
    recording = np.load(golden_dir / "metrics" / "disc_s8_fullshape.npz")
    names = recording["head_keys"]
    drawn = [i for i, name in enumerate(names) if not name.endswith(("weight_u", "weight_v"))]
    pick = lambda key: [recording[key][i] for i in drawn]  # noqa: E731
    state = seeded_state(pick("head_keys"), pick("head_shapes"), head_kind, pick("head_crc"))
    heads = flax_variables({**state, **group(recording, "disc/")})
    assert sum(leaf.size for leaf in jax.tree.leaves(heads["params"])) == 7_386_245
    backbone = seeded_state(
        recording["backbone_keys"], recording["backbone_shapes"], dino_kind, recording["crc"]
    )
    params = stack_blocks(flax_variables(backbone)["params"])

    def discriminate(params, heads, images):
        activations = DinoV1(**DINO["S_8"]).apply({"params": params}, images)
        return DiscriminatorHeads(num_heads=5, channels=384).apply(heads, activations, train=False)

    images = recording["img_u8"] / np.float32(127.5) - 1
    logits = jax.jit(discriminate)(params, heads, images)
    assert relative_error(logits, recording["logits"]) < TOLERANCE
