"""FLOP formulas against counts of the original networks and against the compiler's count."""

import jax
import jax.numpy as jnp
import pytest

from dinosae_jax import sizes
from dinosae_jax.models import ddt, decoder, dit, flops, stem, vit

# Counted on the original networks (as multiply-adds for the decoders).
FLOW = [
    (dit.LightningDiT(in_channels=768), 238.1),
    (dit.LightningDiT(in_channels=1024), 238.4),
    (ddt.DiTDH(in_channels=768), 323.2),
    (ddt.DiTDH(in_channels=1024), 323.8),
]
DECODERS = {
    "A": 191.1,
    "A0": 133.3,
    "B": 343.9,
    "B2": 384.2,
    "C": 234.6,
    "S": 255.7,
    "L": 230.0,
    "D": 365.3,
}


@pytest.mark.parametrize(("model", "giga"), FLOW)
def test_flow_networks(model, giga):
    assert abs(flops.forward_flops(model) / 1e9 - giga) < 0.06


@pytest.mark.parametrize(("preset", "giga_multiply_adds"), DECODERS.items())
def test_decoders(preset, giga_multiply_adds):
    model = decoder.Decoder(**sizes.DECODER[preset])
    assert abs(flops.decoder_flops(model, 16, 16) / 2e9 - giga_multiply_adds) < 0.06


def test_encoder_at_256_pixels():
    transformer = vit.VisionTransformer(**sizes.VIT["dinov3_vitl16"])
    patches = flops.stem_flops(stem.PatchStem(1024), 256, 256)
    # 164.7 G is the whole teacher's count, patch convolution included.
    assert abs((flops.vit_flops(transformer, 16, 16) + patches) / 1e9 - 164.7) < 0.06
    assert abs(flops.stem_flops(stem.ConvStem(1024), 256, 256) / 1e9 - 2.72) < 0.01


def _compiler_count(module, *inputs):
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.jit(module.apply).lower(params, *inputs).cost_analysis()["flops"]


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "module",
    [
        dit.LightningDiT(depth=2, scan_layers=False),
        dit.LightningDiT(depth=1, scan_layers=False, patch_size=2, use_swiglu=False, wo_shift=True),
        ddt.DiTDH(depth=(1, 1), scan_layers=False),
    ],
)
def test_flow_networks_as_lowered(module):
    x = _shape(1, 16, 16, 1024)
    counted = _compiler_count(module, x, _shape(1), _shape(1, dtype=jnp.int32))
    # The rest are norms, softmax, activations and modulation, which the formula leaves out.
    assert 1.0 < counted / flops.forward_flops(module) < 1.02


def test_vit_as_lowered():
    size = sizes.VIT["dinov3_vitl16"] | {"depth": 2, "scan_layers": False}
    module = vit.VisionTransformer(**size)
    counted = _compiler_count(module, _shape(1, 16, 16, 1024))
    assert 1.0 < counted / flops.vit_flops(module, 16, 16) < 1.02


def test_decoder_as_lowered():
    module = decoder.Decoder(latent_channels=256, width_list=(256, 256), depth_list=(1, 1))
    counted = _compiler_count(module, _shape(1, 64, 64, 256))
    # The compiler leaves out the padding: at 64 pixels 1 - (3*64 - 2)^2 / (3*64)^2 = 2%.
    assert 0.97 < counted / flops.decoder_flops(module, 64, 64) < 1.0
