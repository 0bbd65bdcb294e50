"""Configurations read off the keys: those of every published size have the shapes of their keys."""

import pytest

from dinosae_jax import sizes
from weights_conversion import mapping, modules, tables

OFFICIAL = {"decoder": ""}
PUBLISHED = [name for name in sizes.DECODER if name.startswith("dc-ae")]
OURS = [name for name in sizes.DECODER if not name.startswith("dc-ae")]
PLAIN = {
    "latent_channels": 8,
    "width_list": (8, 16, 16),
    "depth_list": (1, 2, 1),
}


def fast(names, *chosen):
    """All names, the others than the chosen ones with `-m slow`."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in chosen)) for n in names]


def keys_of(shapes, rows):
    """Keys and torch shapes of our leaves, by the naming rule and the given rows."""
    layout = mapping.Layout("test", {}, rows)
    found = {}
    for target, shape in shapes.items():
        role, _, rest = target.split("/", 2)
        (name,) = mapping.source_names(layout, f"{role}/{rest}")
        stacked = "{i" in name
        own = torch_shape(target, shape[1:] if stacked else shape, shapes)
        names = [mapping.at_index(name, i) for i in range(shape[0])] if stacked else [name]
        found |= dict.fromkeys(names, own)
    return found


def torch_shape(target, shape, shapes):
    """The way back of the transforms, on shapes."""
    module, leaf = target.rsplit("/", 1)
    if leaf == "kernel":
        return tuple(shape[axis] for axis in {2: (1, 0), 4: (3, 2, 0, 1)}[len(shape)])
    # DINO-SAE's norm over the image has no bias and keeps its axes.
    image_norm = leaf == "scale" and f"{module}/bias" not in shapes
    return (1, *shape, 1, 1) if image_norm and target.startswith("decoder") else shape


def assert_inferred(kind, config, rows):
    """The configuration read off the keys of a configuration gives the same variables."""
    shapes = modules.shapes(config)
    planned = tables.plan(kind, keys_of(shapes, rows)).config
    assert modules.shapes(planned) == shapes
    (found,) = planned.values()
    return found


@pytest.mark.parametrize("size", fast(sizes.VIT, "dinov3_vits16", "dinov3_vith16plus"))
def test_dinov3_sizes(size):
    config = {"vit": sizes.VIT[size]}
    planned = assert_inferred("dinov3", config, {"vit": "", "vit/blocks": "blocks.{i}"})
    assert planned["num_heads"] == sizes.VIT[size]["num_heads"]


@pytest.mark.parametrize("preset", fast(OURS, "A0", "B2"))
def test_official_decoders(preset):
    config = {"decoder": sizes.DECODER[preset]}
    planned = assert_inferred("dinosae_decoder", config, OFFICIAL)
    assert tuple(planned["depth_list"]) == sizes.DECODER[preset]["depth_list"]


@pytest.mark.parametrize("preset", fast(PUBLISHED, "dc-ae-f32c32-sana", "dc-ae-f64c128-1.0"))
def test_published_dcae_decoders(preset):
    config = {"decoder": sizes.DECODER[preset]}
    last = len(config["decoder"]["width_list"]) - 1
    rows = OFFICIAL | {f"decoder/stages_{k}": f"stages.{last - k}" for k in range(last + 1)}
    assert_inferred("dcae_decoder", config, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_shortcut": None, "upsample_shortcut": None},
        {"upsample_shortcut": "InterpolateConv"},
        {"upsample_block_type": "InterpolateConv", "depth_list": (0, 1, 1)},
        {"norm": "bn2d", "out_norm": "bn2d", "out_act": "silu"},
        {"norm": None, "out_norm": None},
        {"out_act": None},
        {"out_act": None, "out_norm": None, "depth_list": (0, 1, 1)},
        {"width_list": (16, 16, 16), "upsample_match_channel": False},
        {"width_list": (32, 32, 32), "block_type": "EViT_GLU", "norm": "bn2d"},
        {"in_channels": 4, "depth_list": (0, 1, 1)},
    ],
)
def test_unusual_decoders(changes):
    config = {"decoder": PLAIN | changes}
    assert_inferred("dinosae_decoder", config, OFFICIAL)


@pytest.mark.parametrize("kind", fast(["lightningdit", "rae_lightningdit"], "rae_lightningdit"))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False},
        {"use_qknorm": True, "wo_shift": True, "patch_size": 2},
        {"learn_sigma": True, "mlp_ratio": 3.0, "num_classes": 10},
        {"hidden_size": 1536, "depth": 2, "num_heads": 24},
        {"class_dropout_prob": 0.0},
    ],
)
def test_lightningdit(kind, changes):
    own = {"model": "LightningDiT", **sizes.LIGHTNING_DIT["S"], "in_channels": 32, **changes}
    own["time_embedding"] = "sinusoidal" if kind == "lightningdit" else "fourier"
    config = {"dit": own}
    planned = assert_inferred(kind, config, {"dit": "", "dit/blocks": "blocks.{i}"})
    # Whether there is RoPE shows in its tables, which are no parameters.
    for name in set(changes) - {"use_rope"}:
        assert planned[name] == changes[name], name


@pytest.mark.parametrize("size", fast(sizes.DIT_DH, "XL"))
@pytest.mark.parametrize("changes", [{}, {"use_pos_embed": False, "use_qknorm": True}])
def test_ditdh(size, changes):
    own = {"model": "DiTDH", **sizes.DIT_DH[size], "in_channels": 32, **changes}
    first = own["depth"][0]
    rows = {
        "dit": "",
        "dit/blocks_encoder": "blocks.{i}",
        "dit/blocks_head": f"blocks.{{i+{first}}}",
    }
    planned = assert_inferred("rae_ditdh", {"dit": own}, rows)
    assert tuple(planned["num_heads"]) == own["num_heads"]


@pytest.mark.parametrize("kind", tables.KINDS)
def test_other_keys_are_refused_in_a_line(kind):
    with pytest.raises(tables.UnknownLayoutError) as caught:
        tables.plan(kind, {"fc.weight": (3, 3)})
    assert "\n" not in str(caught.value)
