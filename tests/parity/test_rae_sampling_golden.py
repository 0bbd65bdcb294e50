"""RAE's DiT^DH through our sampler and guidance, against recorded trajectories of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dinosae_jax.flow import guidance, samplers, schedule
from dinosae_jax.inference import published
from dinosae_jax.models import vit_decoder
from weights_conversion import verify
from weights_conversion.verification.golden import read_golden


def tokens(latents):
    """[b, c, h, w] -> [b, n, c]."""
    return jnp.asarray(latents).reshape(*latents.shape[:2], -1).swapaxes(1, 2)


def check(got, want, name):
    error = float(np.abs(np.asarray(got) - np.asarray(want)).max())
    assert got.shape == want.shape, name
    assert error <= 2e-5 * max(1.0, float(np.abs(want).max())), (name, error)


def network(weights, config):
    size = {name: config[name] for name in ("num_heads", "hidden_size", "depth", "num_classes")}
    built, variables = verify.variables_of("rae_ditdh", weights, {"dit": size})
    return built["dit"], functools.partial(built["dit"].apply, variables["dit"])


def test_trajectories_with_every_guidance(golden_dir):
    golden = read_golden(golden_dir / "rae" / "g_ditdh_sampling.safetensors")
    dit, apply = network(golden.weights, golden.config["config"])
    _, weaker = network(golden.guidance_weights, golden.config["guidance_config"])
    statistics = {"mean": golden.inputs["latent_mean"], "variance": golden.inputs["latent_var"]}
    normal = vit_decoder.standardise(statistics, tokens(golden.inputs["latent_raw"]))
    check(normal, tokens(golden.outputs["latent_normalised"]), "latent_normalised")

    record = published.flow_record(
        {"input_size": 16, "in_channels": 768, "num_classes": dit.num_classes}
    )
    times = schedule.time_grid(8, record["shift"], record["end"])
    np.testing.assert_allclose(times, golden.outputs["grid"], atol=2e-7)

    labels = jnp.asarray(golden.inputs["y"].astype(np.int32))
    flat = {"tangent": lambda x, v: v}
    velocities = {
        "none": guidance.conditional(apply, labels),
        "cfg_1.5_0.0_1.0": guidance.classifier_free(apply, labels, dit.num_classes, 1.5, **flat),
        "cfg_2.0_0.2_0.95": guidance.classifier_free(
            apply, labels, dit.num_classes, 2.0, (0.2, 0.95), **flat
        ),
        "autoguidance_1.42_0.0_1.0": guidance.autoguided(apply, weaker, labels, 1.42, **flat),
    }
    for name, velocity in velocities.items():
        noise = tokens(golden.inputs["z"])
        run = functools.partial(
            samplers.sample,
            velocity,
            times=times,
            method="euler_projection",
            radius=None,
            trajectory=True,
        )
        states = jax.jit(run)(noise)
        wanted = golden.outputs[f"{name}.states"][:, : len(labels)]
        check(states, jnp.stack([tokens(state) for state in wanted]), name)
        final = vit_decoder.restore(statistics, states[-1])
        check(final, golden.outputs[f"{name}.final_denormalised_tokens"], f"{name}, final")
