"""Config rules: every message names the rule, the value and the way out."""

import importlib
import pathlib

import pytest

from configs import (
    bench,
    convert_images,
    encode,
    evaluate,
    hae_stage1,
    hae_stage2,
    quickstart,
    reconstruct,
    rfm_dit,
    sae_stage1,
    sae_stage2,
    sae_stage3,
    sae_stage4,
    sample,
)
from dinosae_jax import config as config_lib
from dinosae_jax import rules, spelling

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
SEEDS = ("seed", "seeds")
STAGES = (sae_stage1, sae_stage2, sae_stage3, sae_stage4, hae_stage1, hae_stage2)


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("argument", [None, "tiny"])
def test_stages_are_valid(module, argument):
    rules.validate(module.get_config(argument))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_job_keeps_its_compiled_programs_but_those_that_measure_compilation(path):
    module = importlib.import_module(f"configs.{path.stem}")
    if hasattr(module, "get_config"):
        measures = path.stem in ("bench", "plan")
        assert module.get_config().compile_cache == ("" if measures else "auto")


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
    ({"trainable": ("decoder", "vit")}, "trainable must be a known name; got 'vit'"),
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


def test_every_job_has_its_rules():
    jobs = pathlib.Path(rules.__file__).parent / "jobs"
    assert set(rules.RULES) == {path.stem for path in jobs.glob("[!_]*.py")}
    config = sae_stage1.get_config("tiny")
    config.job = "trian"
    with pytest.raises(ValueError, match=r"config.job must be .*; did you mean 'train'"):
        rules.validate(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_rule_for_every_seed(path):
    module = importlib.import_module(f"configs.{path.stem}")
    config = module.get_config("tiny") if hasattr(module, "get_config") else {}
    seeds = [field for field, _ in rules.leaves(config) if field.split(".")[-1] in SEEDS]
    for field in seeds:
        for wrong in (-1, 2**32):
            changed = config.copy_and_resolve_references()
            value = (0, wrong) if field.endswith("seeds") else wrong
            changed.update_from_flattened_dict({field: value})
            with pytest.raises(ValueError, match=r"must be a whole number from 0 to 2\^32-1; got"):
                rules.validate(changed)
        value = (2**32 - 1,) if field.endswith("seeds") else 2**32 - 1
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        rules.validate(changed)


def test_the_stages_of_a_chain_draw_from_different_seeds():
    """So that stage 2 does not replay the order and the crops of stage 1."""
    stages = (sae_stage1, sae_stage2, sae_stage3, sae_stage4, rfm_dit)
    assert [module.get_config().seed for module in stages] == [0, 1, 2, 3, 4]
    chain = quickstart.get_config()
    assert len({chain.stages[name].seed for name in chain.chain}) == len(chain.chain)
    assert hae_stage1.get_config().seed != hae_stage2.get_config().seed


@pytest.mark.parametrize("url", ["az://bucket/x", "https://a.b/c", "folder:hf://b/c"])
@pytest.mark.parametrize(
    ("module", "field"),
    [
        (sae_stage1, "init_from"),
        (sae_stage1, "weights.vit"),
        (sae_stage1, "data.source"),
        (sae_stage1, "data.data_dir"),
        (sae_stage1, "compile_cache"),
        (rfm_dit, "data.latents"),
        (encode, "init_from"),
        (evaluate, "encoder"),
        (evaluate, "reference"),
        (evaluate, "samples"),
        (reconstruct, "images"),
        (sample, "weaker"),
        (convert_images, "source"),
    ],
)
def test_a_url_is_no_path(module, field, url):
    config = module.get_config("tiny")
    config.update_from_flattened_dict({field: url})
    match = f"^{field} is a path on this machine or .* gs://, s3://; got '{url}'; copy it"
    with pytest.raises(ValueError, match=match):
        rules.validate(config)


@pytest.mark.parametrize("url", ["gs://bucket/x", "folder:s3://bucket/x"])
def test_a_bucket_needs_its_package(url, monkeypatch):
    config = sae_stage1.get_config("tiny")
    config.data.source = url
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^data.source in a bucket needs .*dinosae-jax\[cloud\]"):
        rules.validate(config)
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: name)
    rules.validate(config)


@pytest.mark.parametrize(
    "place", ["runs/a", "/disk/a:b", "C:/a", "folder:/disk/x", "tar:a/{split}*"]
)
def test_paths_are_no_urls(place):
    rules.require_local("init_from", place)


@pytest.mark.parametrize(
    ("module", "name", "phrase"),
    [
        (
            quickstart,
            "bacth_size",
            "mean --config.stages.stage1.batch_size (also of stage2, stage3,",
        ),
        (quickstart, "stages.stage3.lr", "mean --config.stages.stage3.optimizer.learning_rate?"),
        (quickstart, "optimizer.lr", "mean --config.stages.stage1.optimizer.learning_rate (also"),
        (sae_stage1, "lr", "mean --config.optimizer.learning_rate?"),
        (sae_stage1, "bs", "mean --config.batch_size?"),
        (sae_stage1, "epochs", "mean --config.steps?"),
        (sae_stage1, "ckpt", "mean --config.init_from?"),
        (sae_stage1, "output", "mean --workdir?"),
        (sae_stage1, "losses.gam", "mean 'gan'?"),
        (sae_stage1, "workers", "mean --config.data.workers?"),
        (sample, "batch", "mean 'batch_per_device'?"),
        (sample, "cfg_scale", "mean --config.sampling.guidance?"),
    ],
)
def test_a_key_is_looked_for_in_the_whole_tree(module, name, phrase):
    assert phrase in spelling.nearest_key(module.get_config(), name)


def test_a_key_that_is_like_nothing_gets_the_list():
    assert spelling.nearest_key(quickstart.get_config(), "zzz").startswith("; known: chain, ")


def test_paths_in_the_home_folder_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = sae_stage1.get_config()
    config.weights.vit, config.init_from = "~/dinov3", "runs/~x"
    config.data.source = "folder:~/photos"
    config.lock()
    config_lib.expand_home(config)
    assert config.data.source == "folder:/home/me/photos"
    assert (config.weights.vit, config.init_from) == ("/home/me/dinov3", "runs/~x")


def test_the_frozen_networks_of_a_stage():
    expected = {
        sae_stage1: ("vit", "lpips"),
        sae_stage2: ("vit", "lpips", "dino"),
        rfm_dit: (),
    }
    for module, roles in expected.items():
        assert config_lib.frozen_networks(module.get_config()) == roles
    assert config_lib.frozen_networks(sae_stage1.get_config("tiny")) == ("vit",)


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
