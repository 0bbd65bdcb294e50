"""The Python interface: what it loads, what it computes, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinosae_jax
from dinosae_jax import names
from dinosae_jax.inference.autoencoder import Autoencoder, random_source
from dinosae_jax.inference.batching import map_batches
from dinosae_jax.models import autoencoder as functions
from dinosae_jax.runtime import sharding
from dinosae_jax.weights import weight_source
from tests import tiny
from tests.weights_conversion.layouts import save
from weights_conversion.convert import convert_file
from weights_conversion.verification.golden import read_golden


@pytest.fixture(scope="module")
def workdir(stage_workdir):
    return stage_workdir


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh(1, jax.devices()[:1])


@pytest.fixture(scope="module")
def loaded(workdir, one_device):
    return Autoencoder.load(workdir, mesh=one_device, batch_size=4)


@pytest.fixture(scope="module")
def pictures():
    return tiny.images(5, 32, 48).astype(np.float32) / 255.0


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory):
    """The official layout, once with the teacher's patches and once without."""
    folder = tmp_path_factory.mktemp("converted")
    state = dict(read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights)
    without = {key: value for key, value in state.items() if not key.startswith("TEACHER_ONLY")}
    for name, tensors in (("full", state), ("official", without)):
        save(folder / f"{name}.safetensors", tensors)
        convert_file("dinosae", [folder / f"{name}.safetensors"], folder / name)
    return folder


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_package_offers_the_class():
    assert dinosae_jax.Autoencoder is Autoencoder
    with pytest.raises(AttributeError, match="no attribute 'Autoencoders'"):
        _ = dinosae_jax.Autoencoders


def test_the_methods_are_the_functions_of_the_model(loaded, pictures):
    variables = jax.device_get(loaded.variables)

    @jax.jit
    def directly(x):
        z = functions.encode(loaded.modules, variables, x).tokens
        images = functions.decode(loaded.modules, variables, z, (2, 3))
        return (
            z,
            jnp.clip(images, 0.0, 1.0),
            functions.encode_teacher(loaded.modules, variables, x).tokens,
        )

    z, images = loaded.encode(pictures), loaded.reconstruct(pictures)
    assert z.shape == (5, 6, 32) and images.shape == pictures.shape
    assert z.dtype == images.dtype == np.float32
    # The same float32 arithmetic in batches of another size: sums are ordered differently.
    for ours, theirs in zip(
        (z, images, loaded.encode_teacher(pictures)), directly(pictures), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_array_equal(loaded.decode(z, grid=(2, 3)), images)
    assert images.min() >= 0.0 and images.max() <= 1.0


def test_the_grid_of_a_square_is_inferred(loaded):
    z = np.random.default_rng(0).normal(size=(2, 4, 32))
    images = loaded.decode(z)
    assert images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(loaded.decode(z, grid=(2, 2)), images)


def test_devices_do_not_change_the_result(workdir, loaded, pictures):
    spread = Autoencoder.load(workdir, batch_size=4)
    assert spread.mesh.size == jax.device_count() > 1
    np.testing.assert_allclose(spread.encode(pictures), loaded.encode(pictures), atol=2e-5)


def test_batches_are_filled_up_and_cut(one_device):
    sizes = []

    def function(x):
        sizes.append(x.shape[0])
        return {"double": 2 * x, "sum": x.sum(axis=1)}

    array = np.arange(14.0).reshape(7, 2)
    result = map_batches(function, array, 4, one_device)
    np.testing.assert_array_equal(result["double"], 2 * array)
    np.testing.assert_array_equal(result["sum"], array.sum(axis=1))
    map_batches(function, array[:3], 32, one_device)
    map_batches(function, array[:3], 1, sharding.make_mesh())
    assert sizes == [4, 4, 4, 8]


def test_workdir_checkpoint_and_export_are_the_same_bits(workdir, loaded, pictures, tmp_path):
    checkpoint = workdir / "checkpoints" / "0"
    source = weight_source.open_weights(workdir)
    weight_source.export(source, tmp_path / "export", ("stem", "vit", "decoder"))
    z = loaded.encode(pictures)
    for place in (checkpoint, tmp_path / "export"):
        other = Autoencoder.load(place, mesh=loaded.mesh, batch_size=4)
        assert leaves_equal(other.variables, loaded.variables)
        assert (other.modules, other.convention) == (loaded.modules, loaded.convention)
        assert other.notes == loaded.notes
        np.testing.assert_array_equal(other.encode(pictures), z)
    assert any("randomly initialised" in note for note in loaded.notes)
    assert loaded.convention.tokens == 4 and loaded.convention.pixels == "imagenet"


def test_the_official_layout_loads_without_the_teacher(converted, one_device):
    official = Autoencoder.load(converted / "official", mesh=one_device)
    assert official.convention.pixels == "imagenet"
    assert any("state no latent convention" in note for note in official.notes)
    images = np.linspace(0.0, 1.0, 32 * 48 * 3, dtype=np.float32).reshape(1, 32, 48, 3)
    z = official.encode(images)
    full = Autoencoder.load(converted / "full", pixel_range="unit", mesh=one_device)
    assert full.convention.pixels == "unit" and full.encode_teacher(images).shape == z.shape
    with pytest.raises(ValueError, match="the encoder's own patch convolution"):
        official.encode_teacher(images)
    # The range decides how the same output is read: where neither is clipped they are affine.
    std, mean = np.array(names.IMAGENET_STD), np.array(names.IMAGENET_MEAN)
    raw, shown = full.decode(z, (2, 3)), official.decode(z, (2, 3))
    inside = (raw > 0.0) & (raw < 1.0) & (shown > 0.0) & (shown < 1.0)
    assert inside.sum() > 100
    np.testing.assert_allclose(shown[inside], (raw * std + mean)[inside], atol=2e-5)


def test_unusable_weights_are_refused_in_one_line(tmp_path, workdir, data_dir):
    state = dict(read_golden(data_dir / "autoencoder" / "e_autoencoder.safetensors").weights)
    alone = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    save(tmp_path / "decoder.safetensors", alone)
    vit = {
        k.removeprefix("dino_model."): v
        for k, v in state.items()
        if k.startswith("dino_model.") and "patch_embed" not in k
    }
    vit |= {
        k.removeprefix("TEACHER_ONLY."): v for k, v in state.items() if k.startswith("TEACHER_ONLY")
    }
    save(tmp_path / "vit.safetensors", vit)
    convert_file(
        "dinov3", [tmp_path / "vit.safetensors"], tmp_path / "vit", None, {"vit": {"num_heads": 2}}
    )
    chain = tmp_path / "chain"
    chain.mkdir()
    (chain / "chain.json").write_text('{"stages": ["stage1", "stage4"]}')
    for place, message in [
        (tmp_path / "vit", "needs the roles stem, vit, decoder; got .* with only vit"),
        (tmp_path / "nothing", "does not exist; give another path"),
        (tmp_path, "holds none of these"),
        (chain, r"holds a chain; give one of its stages \(stage1, stage4\)"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            Autoencoder.load(place)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="trained with pixel_range='imagenet'; got 'unit'"):
        Autoencoder.load(workdir, pixel_range="unit")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), r"floating point in \[0, 1\]; got uint8"),
        (np.zeros((32, 32, 3)), r"images are \[b, h, w, 3\]"),
        (np.zeros((0, 32, 32, 3)), "at least one"),
        (np.zeros((1, 3, 32, 32)), "move the channels last"),
        (np.zeros((1, 40, 32, 3)), "got 40 x 32; crop to 32 x 32"),
        (np.full((1, 32, 32, 3), 255.0), "got 255 to 255; rescale"),
        (np.full((1, 32, 32, 3), np.nan), "got nan to nan"),
        (np.full((1, 32, 32, 3), -0.5), "got -0.5"),
    ],
)
def test_bad_images_are_refused(loaded, images, message):
    for method in (loaded.encode, loaded.reconstruct):
        with pytest.raises(ValueError, match=message):
            method(images)


@pytest.mark.parametrize(
    ("z", "grid", "message"),
    [
        (np.zeros((1, 4, 16)), None, r"\[b, n, 32\]"),
        (np.zeros((4, 32)), None, r"\[b, n, 32\]"),
        (np.zeros((1, 4, 32), int), None, "got int64"),
        (np.full((1, 4, 32), np.inf), None, "must be finite"),
        (np.zeros((1, 6, 32)), None, "6 tokens and no grid"),
        (np.zeros((1, 6, 32)), (2, 2), r"6 tokens and the grid \(2, 2\)"),
        (np.zeros((1, 6, 32)), (-2, -3), "6 tokens and the grid"),
    ],
)
def test_bad_latents_are_refused(loaded, z, grid, message):
    with pytest.raises(ValueError, match=message):
        loaded.decode(z, grid)


@pytest.mark.slow
def test_random_weights_depend_on_the_seed():
    model = tiny.model()
    first, again, other = (random_source(model, seed) for seed in (0, 0, 1))
    assert leaves_equal(first.variables, again.variables)
    assert not leaves_equal(first.variables, other.variables)
    assert set(first.model) == {"stem", "vit", "decoder", "pixel_range"}
    assert "nothing else" in first.notes[0]
