"""Published implementations at random weights against ours, where torch is present.

Each test saves a state dict with torch, converts it, and compares our module's output. They skip
where torch or the library is missing.
"""

import jax
import numpy as np
import pytest

from dinosae_jax.inference.autoencoder import Autoencoder
from dinosae_jax.models.registry import build
from dinosae_jax.runtime import sharding
from dinosae_jax.weights import conversion
from weights_conversion.convert import convert_file

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def operators():
    """The CUDA wheel of torchvision registers no operators on a CPU torch; two are needed."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.manual_seed(0)
    yield library


def randomised(module):
    """The module with every parameter moved away from its initial value, in evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def converted(tmp_path, kind, module, **overrides):
    """Our modules and variables for a torch module's state dict, by way of a .pth file."""
    torch.save(module.state_dict(), tmp_path / "a.pth")
    convert_file(kind, [tmp_path / "a.pth"], tmp_path / "out", overrides=overrides or None)
    loaded = conversion.load(tmp_path / "out")
    return {r: build(r, c) for r, c in loaded.config.items()}, loaded.variables


def assert_close(actual, expected):
    expected = expected.detach().numpy()
    bound = 2e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(np.asarray(actual) - expected).max() <= bound


def tokens(modules, variables, images):
    """All tokens of an encoder after its last norm, in the order of the published ones."""
    vit, own = modules["vit"], variables["vit"]

    @jax.jit
    def run(x):
        out = vit.apply(own, vit.apply(own, x, method=type(vit).embed_patches))
        first = [out.cls[:, None]] if vit.class_token else []
        return jax.numpy.concatenate([*first, out.storage, out.patches], axis=1)

    return run(images.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("gated", [False, True])
def test_transformers_dinov3(tmp_path, gated):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        layerscale_value=1.0,
    )
    module = randomised(transformers.DINOv3ViTModel(config))
    images = torch.randn(2, 3, 48, 80)
    assert_close(
        tokens(*converted(tmp_path, "dinov3", module), images), module(images).last_hidden_state
    )


SIZE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_transformers_dinov2(tmp_path, registers, gated, grid):
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        **SIZE, image_size=56, patch_size=14, use_swiglu_ffn=gated
    )
    module = randomised(getattr(transformers, f"{name}Model")(config))
    images = torch.randn(2, 3, 14 * grid[0], 14 * grid[1])
    expected = module(images).last_hidden_state
    assert_close(tokens(*converted(tmp_path, "dinov2", module), images), expected)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_transformers_siglip(tmp_path, grid):
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        **SIZE, intermediate_size=192, image_size=64, patch_size=16, vision_use_head=False
    )
    module = randomised(transformers.SiglipVisionModel(config))
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    expected = module(images, interpolate_pos_encoding=True).last_hidden_state
    assert_close(tokens(*converted(tmp_path, "siglip2", module), images), expected)


def test_transformers_mae(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **SIZE, intermediate_size=192, image_size=64, patch_size=16, mask_ratio=0.0
    )
    module = randomised(transformers.ViTMAEModel(config))
    images = torch.randn(2, 3, 64, 64)
    in_order = torch.arange(16.0).expand(2, -1)  # the noise whose sorting shuffles the patches
    expected = module(images, noise=in_order).last_hidden_state
    assert_close(tokens(*converted(tmp_path, "mae", module), images), expected)


@pytest.mark.parametrize("encoder", ["dinov2", "mae"])  # diffusers 0.42 fails to make siglip2's
def test_diffusers_autoencoder_rae(tmp_path, encoder):
    diffusers = pytest.importorskip("diffusers")
    patch = 14 if encoder == "dinov2" else 16
    module = diffusers.AutoencoderRAE(
        encoder_type=encoder,
        encoder_hidden_size=128,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=2,
        encoder_input_size=4 * patch,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=96,
        latents_mean=torch.randn(128, 4, 4),
        latents_std=0.5 + torch.rand(128, 4, 4),
    )
    module = randomised(module)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    heads = {"decoder": {"num_heads": 2}}
    convert_file("rae_autoencoder", [tmp_path / "a.pth"], tmp_path / "out", overrides=heads)
    autoencoder = Autoencoder.load(tmp_path / "out", mesh=sharding.make_mesh(1, jax.devices()[:1]))
    images = torch.rand(2, 3, 64, 64)
    latents = module.encode(images).latent
    z = autoencoder.encode(images.permute(0, 2, 3, 1).numpy())
    assert_close(z, module._denormalize_latents(latents).flatten(2).mT)
    assert_close(
        autoencoder.decode(z), module.decode(latents).sample.clamp(0, 1).permute(0, 2, 3, 1)
    )


@pytest.mark.parametrize("qkvb", [False, True])
def test_timm_dinov3(tmp_path, qkvb):
    timm = pytest.importorskip("timm")
    name = "vit_small_patch16_dinov3" + ("_qkvb" if qkvb else "")
    module = randomised(timm.create_model(name, depth=2, num_classes=0))
    images = torch.randn(1, 3, 64, 96)
    module.set_input_size((64, 96))
    assert_close(
        tokens(*converted(tmp_path, "dinov3", module), images), module.forward_features(images)
    )


@pytest.mark.parametrize("upsampler", ["pixel_shuffle", "interpolate"])
def test_diffusers_autoencoder_dc(tmp_path, upsampler):
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(32, 64, 64),
        decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 2, 1) if upsampler == "interpolate" else (0, 2, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type=upsampler,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    module = randomised(module)
    latent = torch.randn(2, 32, 5, 7)
    modules, variables = converted(tmp_path, "dcae_decoder", module)
    run = jax.jit(modules["decoder"].apply)
    image = run(variables["decoder"], latent.permute(0, 2, 3, 1).numpy())
    assert_close(image.transpose(0, 3, 1, 2), module.decode(latent).sample)


def test_lpips(tmp_path):
    lpips = pytest.importorskip("lpips")
    module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    a, b = torch.rand(2, 2, 3, 40, 48).unbind()
    modules, variables = converted(tmp_path, "lpips_vgg16", module)
    ours = [x.permute(0, 2, 3, 1).numpy() for x in (a, b)]
    distance = jax.jit(modules["lpips"].apply)(variables["lpips"], *ours)
    assert_close(distance, module(a, b, normalize=True)[:, 0, 0, 0])
