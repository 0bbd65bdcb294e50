"""LightningDiT and DiT^DH against recorded activations of the reference implementations."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinosae_jax.models import positions
from tests.parity import dit_keys
from weights_conversion.verification import reference_guidance as guidance

FAMILIES = ("orig_lightningdit", "rae_lightningdit", "rae_ditdh")
SUBSET = "generation_models"


def _expected_shapes(module, inputs):
    x = jnp.zeros(dit_keys.nhwc(inputs["x"]).shape)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, inputs["t"], inputs["y"])
    return jax.tree.map(lambda a: a.shape, shapes["params"])


def _guided(family, name, model, guide, inputs):
    """The recorded guidance output `name`, recomputed."""
    x, t, y = inputs["cfg_x"], inputs["cfg_t"], inputs["cfg_y"]
    numbers = [float(n) for n in re.findall(r"_(\d+(?:\.\d+)?)(?=_|$)", name)]
    scale = inputs["cfg_scale"]
    if family == "orig_lightningdit":
        return guidance.lightningdit_cfg(model, x, t, y, scale, *numbers)
    if family == "rae_lightningdit":
        off = [tuple(numbers[:2])] if numbers else ()
        return guidance.rae_lightningdit_cfg(model, x, t, y, scale, off, *numbers[2:])
    if name.startswith("autoguidance"):
        return guidance.ditdh_autoguidance(model, guide, x, t, y, 1.42, tuple(numbers))
    return guidance.ditdh_cfg(model, x, t, y, scale, tuple(numbers))


def _jitted(module, params, **static):
    """Velocities by one compiled program, in pieces of three examples: all cases have 3 or 6."""
    apply = functools.partial(module.apply, **static)
    # Compiling takes nearly all of the time here; its last optimisations do not pay.
    run = jax.jit(apply, compiler_options={"xla_backend_optimization_level": 0})

    def model(*args, **arrays):
        cuts = range(3, len(args[0]), 3)
        pieces = zip(*(np.split(a, cuts) for a in args), strict=True)
        outputs = [run({"params": params}, *piece, **arrays) for piece in pieces]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    return model


def _guide(family, config, groups):
    """The recorded weak model of autoguidance; DiT^DH cases only."""
    if family != "rae_ditdh":
        return None
    config = config["guidance_model"]
    params = dit_keys.to_params(groups["guidance_weights"], config["depth"][0])
    return _jitted(dit_keys.build(family, config), params)


def _compute(family, config, groups):
    """Every recorded output and intermediate of a case, by the recorded names."""
    module = dit_keys.build(family, config)
    depth = config["depth"][0] if family == "rae_ditdh" else None
    params = dit_keys.to_params(groups["weights"], depth)
    assert jax.tree.map(jnp.shape, params) == _expected_shapes(module, groups["inputs"])
    seeing, guide = _jitted(module, params, intermediates=True), _guide(family, config, groups)
    inputs = {k: dit_keys.nhwc(v) for k, v in groups["inputs"].items()}
    args = inputs["x"], inputs["t"], inputs["y"]
    v, seen = seeing(*args)
    out = {"outputs/v": v} | {f"intermediates/{k}": a for k, a in seen.items()}
    for name in groups["outputs"].keys() - {"v"}:
        if name == "v_with_s_given":
            value = seeing(*args, encoder_state=inputs["s_given"])[0]
        else:
            value = _guided(family, name, lambda *a: seeing(*a)[0], guide, inputs)
        out[f"outputs/{name}"] = value
    return out


def check_case(family: str, path: pathlib.Path) -> float:
    """Compares all recorded tensors; returns the largest error over max|reference|."""
    config, groups = dit_keys.read_case(path)
    computed = _compute(family, config, groups)
    worst = 0.0
    for group in ("outputs", "intermediates"):
        for name, expected in groups[group].items():
            b = dit_keys.nhwc(expected)
            a = np.asarray(computed[f"{group}/{name}"])
            assert a.shape == b.shape, (path.name, name)
            error, largest = np.abs(a - b).max(), np.abs(b).max()
            # float32 rounding of two implementations; the recordings state this tolerance.
            assert error <= 1e-5 * largest, (path.name, name, error / largest)
            assert error <= 2e-5 * max(1.0, largest), (path.name, name)
            worst = max(worst, float(error / largest))
    return worst


def check_tables(path: pathlib.Path) -> None:
    """The stored sin-cos table and RoPE buffers equal the computed ones."""
    config, groups = dit_keys.read_case(path)
    side = config["input_size"] // config["patch_size"]
    for key, stored in groups["weights"].items():
        if key == "pos_embed":
            computed = positions.sincos_table(side, stored.shape[-1])[None]
        elif key.endswith(("freqs_cos", "freqs_sin")):
            computed = positions.rope_tables(side, stored.shape[-1])[key.endswith("sin")]
        else:
            continue
        # The reference takes cosines of float32 angles up to 3: half an ulp of those.
        np.testing.assert_allclose(computed, stored, atol=3e-7)


def _cases(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    return [(f, p) for f in FAMILIES for p in sorted((folder / f).glob("*.safetensors"))]


SUBSET_CASES = _cases(pathlib.Path(__file__).parents[1] / "recordings" / SUBSET)


@pytest.mark.parametrize(
    ("family", "path"), SUBSET_CASES, ids=[f"{f}-{p.stem}" for f, p in SUBSET_CASES]
)
def test_recorded_case(family, path):
    check_tables(path)
    assert check_case(family, path) > 0.0


def test_subset_has_every_family():
    assert {family for family, _ in SUBSET_CASES} == set(FAMILIES)


def test_every_recorded_case(golden_dir):
    cases = _cases(golden_dir / "generation")
    assert len(cases) == 63
    worst: dict[str, float] = {}
    for family, path in cases:
        check_tables(path)
        worst[family] = max(worst.get(family, 0.0), check_case(family, path))
    print("largest error over max|reference|:", worst)
