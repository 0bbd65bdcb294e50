"""Published implementations at random weights against ours, where torch is present.

Each test saves a state dict with torch, converts it, and compares our module's output. They skip
where torch or the library is missing.
"""

import jax
import numpy as np
import pytest

from dinosae_jax.models.registry import build
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
    modules, variables = converted(tmp_path, "dinov3", module)
    vit, own = modules["vit"], variables["vit"]

    @jax.jit
    def run(x):
        out = vit.apply(own, vit.apply(own, x, method=type(vit).embed_patches))
        return jax.numpy.concatenate([out.cls[:, None], out.storage, out.patches], axis=1)

    assert_close(run(images.permute(0, 2, 3, 1).numpy()), module(images).last_hidden_state)


@pytest.mark.parametrize("qkvb", [False, True])
def test_timm_dinov3(tmp_path, qkvb):
    timm = pytest.importorskip("timm")
    name = "vit_small_patch16_dinov3" + ("_qkvb" if qkvb else "")
    module = randomised(timm.create_model(name, depth=2, num_classes=0))
    images = torch.randn(1, 3, 64, 96)
    module.set_input_size((64, 96))
    modules, variables = converted(tmp_path, "dinov3", module)
    vit, own = modules["vit"], variables["vit"]

    @jax.jit
    def run(x):
        out = vit.apply(own, vit.apply(own, x, method=type(vit).embed_patches))
        return jax.numpy.concatenate([out.cls[:, None], out.storage, out.patches], axis=1)

    assert_close(run(images.permute(0, 2, 3, 1).numpy()), module.forward_features(images))


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
