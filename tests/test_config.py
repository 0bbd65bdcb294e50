"""Config rules: every message names the rule, the value and the way out."""

import importlib
import pathlib

import pytest

from configs import (
    bench,
    hae_stage1,
    hae_stage2,
    quickstart,
    sae_stage1,
    sae_stage2,
    sae_stage3,
    sae_stage4,
)
from dinosae_jax import config as config_lib
from dinosae_jax import rules

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
STAGES = (sae_stage1, sae_stage2, sae_stage3, sae_stage4, hae_stage1, hae_stage2)


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("argument", [None, "tiny"])
def test_stages_are_valid(module, argument):
    rules.validate(module.get_config(argument))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_job_can_keep_its_compiled_programs(path):
    module = importlib.import_module(f"configs.{path.stem}")
    if hasattr(module, "get_config"):
        assert module.get_config().compile_cache == ""


def test_quickstart_is_valid():
    rules.validate(quickstart.get_config())


@pytest.mark.parametrize(
    ("module", "rate", "betas", "trainable", "losses", "tau"),
    [
        (sae_stage1, 1e-5, (0.9, 0.999), {"stem", "decoder"}, (1, 1, 0.5, 0), 0),
        (sae_stage2, 1e-4, (0.5, 0.9), {"stem", "decoder"}, (1, 1, 0.5, 0.5), 0),
        (sae_stage3, 1e-4, (0.5, 0.9), {"decoder"}, (1, 1, 0, 0.5), 0),
        (sae_stage4, 5.4e-5, (0.5, 0.9), {"decoder"}, (1, 1, 0, 0.5), 0.8),
    ],
)
def test_the_papers_numbers(module, rate, betas, trainable, losses, tau):
    config = module.get_config()
    assert config.optimizer.learning_rate == rate
    assert (config.optimizer.b1, config.optimizer.b2) == betas
    assert set(config.trainable) == trainable
    assert tuple(config.losses[n] for n in ("l1", "lpips", "cosine", "gan")) == losses
    assert config.latent_noise.tau == tau
    assert config.batch_size == 256
    assert config.data.image_size == 256


def test_the_second_versions_numbers():
    """Paper v2: 20 epochs aligned, then 40 with GAN and noise on a frozen encoder, batch 512."""
    first, second = hae_stage1.get_config(), hae_stage2.get_config()
    epoch = 1_281_167 // 512
    assert (
        (first.batch_size, first.steps)
        == (second.batch_size, second.steps // 2)
        == (512, 20 * epoch)
    )
    assert second.optimizer.learning_rate == 5e-5
    assert (second.optimizer.b1, second.optimizer.b2) == (0.5, 0.9)
    assert second.ema == 0.9975
    assert second.gan.to_dict() == {"start": 2 * epoch, "disc_start": 0}
    assert second.latent_noise.to_dict() == {"tau": 0.8, "tau_end": 1.2, "ramp_steps": 20 * epoch}
    losses = {name: weight for name, weight in second.losses.items() if weight}
    assert losses == {"l1": 1.0, "lpips": 1.0, "gan": 0.5}
    assert tuple(second.trainable) == ("decoder",)


WRONG = [
    ({"steps": 0}, "steps must be above zero"),
    ({"batch_size": -1}, "batch_size must be above zero"),
    ({"optimizer.learning_rate": 0.0}, "learning_rate must be above zero"),
    ({"optimizer.learning_rate": float("inf")}, "learning_rate must be a finite number; got inf"),
    ({"losses.l1": float("nan")}, r"losses.l1 must be a finite number.*--config.losses.l1="),
    ({"optimizer.schedule": "cosin"}, "did you mean 'cosine'"),
    ({"optimizer.clip_norm": -1.0}, "must not be negative"),
    ({"accumulation": 3}, "multiple of accumulation"),
    ({"losses.l1": 0.0, "losses.lpips": 0.0}, "needs a reconstruction loss"),
    ({"losses.cosine": -1.0}, "must not be negative"),
    ({"trainable": ("decoder",)}, "needs 'stem' in trainable"),
    ({"trainable": ("stem",)}, "trains the decoder"),
    ({"trainable": ("decoder", "vit")}, "'vit' is not known"),
    ({"latent_noise.tau": 0.8}, "frozen encoder"),
    ({"latent_noise.tau_end": 0.8, "latent_noise.ramp_steps": 9}, "frozen encoder"),
    ({"latent_noise.tau_end": 0.8}, "one needs the other"),
    ({"latent_noise.ramp_steps": 9}, "one needs the other"),
    ({"losses.gan": 0.5, "gan.start": 2, "gan.disc_start": 3}, "got gan.disc_start=3 after"),
    ({"profile_steps": "10-13"}, r"profile_steps is FIRST:END .* got '10-13'"),
    ({"profile_steps": "13:10"}, "1 <= FIRST < END"),
    ({"profile_steps": "0:2"}, "1 <= FIRST < END"),
    ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
    ({"data.image_size": 100}, "multiple of the patch size"),
    ({"random_frozen_ok": ("vitt",)}, "did you mean 'vit'"),
    ({"dtype": "float16"}, "dtype"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_mistakes_are_named(changes, message):
    config = sae_stage1.get_config("tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message) as caught:
        rules.validate(config)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_chain_names_its_stage_and_flag():
    config = quickstart.get_config()
    config.stages.stage2.steps = 0
    match = r"^stages.stage2: steps must be above zero; got 0; set --config.stages.stage2.steps="
    with pytest.raises(ValueError, match=match):
        rules.validate(config)


def test_a_benchmark_times_at_least_one_step():
    config = bench.get_config("tiny")
    config.repeats = 0
    with pytest.raises(ValueError, match="repeats must be above zero; got 0"):
        rules.validate(config)


def test_a_frozen_stem_needs_init_from():
    config = sae_stage3.get_config("tiny")
    config.init_from = ""
    with pytest.raises(ValueError, match="empty init_from"):
        rules.validate(config)


def test_leftovers_in_the_argument_are_refused():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        sae_stage1.get_config("tinny")


def test_differences_name_every_leaf():
    ours, theirs = {"a": {"b": 1, "c": (1, 2)}, "d": 3}, {"a": {"b": 2, "c": [1, 2]}}
    assert config_lib.differences(ours, theirs) == [
        "a.b: 1 here, 2 there",
        "d: 3 here, None there",
    ]


@pytest.mark.parametrize(
    "path", sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py")), ids=str
)
def test_every_config_says_what_it_is_and_how_to_run_it(path):
    module = importlib.import_module(f"configs.{path.stem}")
    assert module.__doc__
    if hasattr(module, "get_config"):
        assert f"--config=configs/{path.name}" in module.__doc__
