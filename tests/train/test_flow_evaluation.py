"""KID while a flow trains: the evaluation's number, compiled once, on any number of devices."""

import jax
import numpy as np
import pytest

from dinosae_jax.data import images, loading
from dinosae_jax.eval import features, kernel_distance
from dinosae_jax.inference.generator import Generator
from dinosae_jax.inference.sampling_program import Sampling, compile_generate, decode_parts
from dinosae_jax.models import autoencoder
from dinosae_jax.runtime import precision, sharding
from dinosae_jax.train import flow_evaluation, flow_task
from dinosae_jax.weights import weight_source
from tests.tiny import small_flow


@pytest.fixture(scope="module")
def config():
    return precision.resolve_config(small_flow())


def distance_on(config, workdir, devices):
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    found = weight_source.open_weights(workdir)
    variables = jax.device_put(found.variables, sharding.replicated(mesh))
    stage = flow_task.step_spec(config)
    source = images.open_images(config.data, "train")
    distance = flow_evaluation.SampleDistance(config, stage, variables, source, mesh)
    return distance, Generator.load(workdir, "float32", mesh), variables


def test_the_number_is_kid_of_samples_and_training_images(config, flow_workdir):
    distance, generator, variables = distance_on(config, flow_workdir, 1)
    value = distance(generator)[flow_evaluation.KID]
    source = images.open_images(config.data, "train")
    found = loading.training_batches(source, config, distance.mesh, ("image", "label"), 12)
    batch = next(found)
    drawn = generator.sample(batch["label"], key=jax.random.PRNGKey(config.seed))
    pixels = [np.floor(255 * drawn + 0.5) / np.float32(255), batch["image"] / np.float32(255)]
    modules = flow_task.step_spec(config).modules
    encode = jax.jit(lambda x: autoencoder.encode(modules, variables, x).tokens.mean(1))
    expected = kernel_distance.squared_mmd(*(np.asarray(encode(side)) for side in pixels))
    assert value == pytest.approx(expected, rel=1e-4)  # float32 features, another batch size


@pytest.mark.slow
def test_nothing_is_compiled_twice_and_noise_is_fixed(config, flow_workdir):
    distance, generator, _ = distance_on(config, flow_workdir, 8)
    first = distance(generator)
    own = generator.settings()
    parts_ = decode_parts(distance.size // distance.mesh.size)
    sampling = Sampling(own["sampler"], own["steps"], False, tuple(own["interval"]), parts_)
    compiled = (
        compile_generate(generator.networks, sampling),
        features._compiled(distance.network.apply, (features.ENCODER_TAP,)),
    )
    before = [each._cache_size() for each in compiled]
    assert distance(generator) == first
    assert [each._cache_size() for each in compiled] == before
    assert before[1] == 1  # samples and training images share one
    alone, generator, _ = distance_on(config, flow_workdir, 1)
    assert alone(generator)[flow_evaluation.KID] == pytest.approx(
        first[flow_evaluation.KID], rel=1e-4
    )


@pytest.mark.slow
def test_without_samples_no_encoder_is_asked_for(tmp_path, monkeypatch):
    """With cached latents it is not on the devices then."""
    monkeypatch.delattr(flow_evaluation, "SampleDistance")
    config = precision.resolve_config(small_flow(**{"eval.samples": 0}))
    assert flow_task.prepare(config, tmp_path, sharding.make_mesh()).step
