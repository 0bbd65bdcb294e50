"""What is missing is told at once, as commands from where the user stands to a running job."""

import json
import pathlib
import sys

import pytest

from configs import (
    encode,
    evaluate,
    imagenette,
    quickstart,
    reconstruct,
    rfm_dit,
    sae_stage1,
    sae_stage2,
    sample,
)
from dinosae_jax import names, preflight
from tests.test_documents import parse

MAIN = preflight.PROGRAM
HEADING = "From here to a running job:"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The tests run in an empty folder, without prepared data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


def missing(config, *arguments, workdir="runs/x", program="main.py"):
    """(heading, commands) of the answer; ('', []) where nothing is missing."""
    before = set(sys.modules)
    try:
        preflight.check(config, pathlib.Path(workdir), (program, *arguments))
    except preflight.Missing as error:
        assert "jax" not in set(sys.modules) - before
        heading, *lines = str(error).splitlines()
        numbered = [line for line in lines if not line.startswith("     #")]
        for number, line in enumerate(numbered, 1):
            assert line.startswith(f"  {number}. ")
        return heading, [line.partition(". ")[2] for line in numbered]
    return "", []


def write(path, content="{}"):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def convert(role, folder=None):
    record = {"kind": names.CONVERSIONS[role].kind, "config": {role: {}}}
    write(f"{folder or names.CONVERSIONS[role].folder}/conversion.json", json.dumps(record))


def finish(folder, *frozen, done=True):
    """A stage's workdir as it looks from outside."""
    write(f"{folder}/config.json")
    for role in frozen:
        write(f"{folder}/frozen/{role}-0123456789abcdef.safetensors")
    if done:
        write(f"{folder}/DONE", json.dumps({"step": 1}))


def prepare_images():
    pathlib.Path("tfds/imagenet2012").mkdir(parents=True)


STAGES = [
    f"{MAIN} --config=configs/sae_stage1.py --config.weights.vit=weights/dinov3 "
    "--config.weights.lpips=weights/lpips",
    f"{MAIN} --config=configs/sae_stage2.py --config.weights.dino=weights/dino",
    f"{MAIN} --config=configs/sae_stage3.py",
    f"{MAIN} --config=configs/sae_stage4.py",
]
FLOW = f"{MAIN} --config=configs/rfm_dit.py"


def test_from_nothing_to_the_flow():
    heading, commands = missing(rfm_dit.get_config(), "--config=configs/rfm_dit.py")
    assert heading == (
        "missing: runs/sae_stage4 (init_from), images (data.source=tfds:imagenet2012). " + HEADING
    )
    conversions = [names.CONVERSIONS[role].command() for role in ("vit", "lpips", "dino")]
    assert commands[:3] == conversions
    assert commands[3].startswith(f"{MAIN} --config=configs/convert_images.py --workdir=data/imag")
    archive = " --config.data.source=array_record:data/imagenet"
    assert commands[4:] == [command + archive for command in (*STAGES, FLOW)]


def test_an_archive_of_imagenet_is_named_where_it_was_made():
    for role in ("vit", "lpips"):
        convert(role)
    write("data/imagenet/train/manifest.json")
    heading, commands = missing(sae_stage1.get_config(), "--config=configs/sae_stage1.py")
    assert "images (data.source=tfds:imagenet2012)" in heading
    assert commands == [f"{STAGES[0]} --config.data.source=array_record:data/imagenet"]


def test_the_command_for_imagenet_is_one_of_its_config(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    config = parse(preflight.IMAGENET_COMMAND)
    assert config.job == "convert_images"
    assert config.source == "tar:DIR/ILSVRC2012_img_{split}.tar"
    assert config.eval_synsets == "LIST"


def test_what_is_there_is_not_asked_for():
    prepare_images()
    convert("vit")
    finish("runs/sae_stage1", "vit", "lpips")
    _, commands = missing(rfm_dit.get_config(), "--config=configs/rfm_dit.py")
    assert commands == [names.CONVERSIONS["dino"].command(), *STAGES[1:], FLOW]
    finish("runs/sae_stage4", "vit", "lpips", "dino")
    assert missing(rfm_dit.get_config()) == ("", [])


def test_a_stage_lacks_the_flags_of_its_weights():
    prepare_images()
    convert("vit")
    convert("lpips")
    heading, commands = missing(sae_stage1.get_config(), "--config=configs/sae_stage1.py")
    assert "DINOv3 ViT (weights.vit is empty), LPIPS VGG16 (weights.lpips is empty)" in heading
    assert commands == STAGES[:1]
    config = sae_stage1.get_config()
    config.weights.vit, config.weights.lpips = "weights/dinov3", "weights/lpips"
    assert missing(config) == ("", [])


def test_a_published_file_or_another_network_is_converted():
    prepare_images()
    convert("lpips")
    write("dinov3.pth")
    config = sae_stage1.get_config()
    config.weights.vit, config.weights.lpips = "dinov3.pth", "weights/lpips"
    flags = ("--config=configs/sae_stage1.py", "--config.weights.vit=dinov3.pth")
    heading, commands = missing(config, *flags, "--config.weights.lpips=weights/lpips")
    assert "weights.vit=dinov3.pth, which is no folder of converted weights" in heading
    assert commands[0] == names.CONVERSIONS["vit"].command("dinov3.pth")
    assert commands[1].endswith(
        "--config.weights.lpips=weights/lpips --config.weights.vit=weights/dinov3"
    )
    config.weights.vit = "weights/lpips"
    assert "holds another network, of kind lpips_vgg16" in missing(config)[0]


def test_an_unfinished_run_is_resumed_first():
    prepare_images()
    finish("runs/sae_stage1", "vit", "lpips", done=False)
    pathlib.Path("runs/sae_stage1/checkpoints/2000/state").mkdir(parents=True)
    convert("dino")
    config = sae_stage2.get_config()
    config.weights.dino = "weights/dino"
    heading, commands = missing(config, "--config=configs/sae_stage2.py")
    assert "runs/sae_stage1 (init_from, not finished)" in heading
    assert commands[-2].startswith(f"{MAIN} --config=configs/sae_stage1.py")
    assert commands[-2].endswith("--config.init_from=runs/sae_stage1/checkpoints/2000")
    config.init_from = "runs/sae_stage1/checkpoints/2000"
    assert missing(config) == ("", [])


def test_a_flow_can_be_sampled_while_it_trains():
    finish("runs/rfm_dit", done=False)
    assert missing(sample.get_config()) == ("", [])


def test_earlier_stages_get_the_images_that_were_given():
    write("my photos/train/a/1.png")
    config = rfm_dit.get_config()
    config.data.source, config.init_from = "folder:my photos", "/disk/sae_stage1"
    _, commands = missing(config, "--config=configs/rfm_dit.py")
    assert commands[2] == (
        f"{MAIN} --config=configs/sae_stage1.py --workdir=/disk/sae_stage1 "
        "--config.weights.vit=weights/dinov3 --config.weights.lpips=weights/lpips "
        "--config.data.source='folder:my photos'"
    )


def test_a_tiny_stage_starts_from_the_tiny_one():
    _, commands = missing(sae_stage2.get_config("tiny"), "--config=configs/sae_stage2.py:tiny")
    assert commands == [
        f"{MAIN} --config=configs/sae_stage1.py:tiny",
        f"{MAIN} --config=configs/sae_stage2.py:tiny",
    ]


def test_a_misspelt_run_is_answered_with_its_neighbour():
    finish("runs/my_flow")
    config = sample.get_config()
    config.init_from = "runs/my_flw"
    heading, commands = missing(config, "--config=configs/sample.py", program="bin/dinosae")
    assert "runs/my_flw (init_from), did you mean runs/my_flow" in heading
    assert commands[-1] == "dinosae --config=configs/sample.py"


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("folder:set", "set/train/a/1.png"),
        ("tar:set/{split}*.tar", "set/train0.tar"),
        ("array_record:set", "set/train/manifest.json"),
        ("array_record:set", "set/manifest.json"),
    ],
)
def test_images_are_looked_for(source, file):
    config = encode.get_config("tiny")
    config.data.source = source
    heading, commands = missing(config, "--config=configs/encode.py:tiny")
    assert f"images (data.source={source})" in heading
    assert len(commands) == 2
    write(file)
    assert missing(config) == ("", [])


def test_the_images_of_reconstruct_are_a_folder_or_a_source():
    config = reconstruct.get_config("tiny")
    for images in ("mine", "folder:mine", "tfds:cifar10"):
        config.images = images
        heading, _ = missing(config)
        assert f"images (images={images})" in heading
    write("mine/1.png")
    config.images = "mine"
    assert missing(config) == ("", [])


def test_the_nearest_data_set_is_named():
    config = encode.get_config("tiny")
    config.data.source = "tfds:imagenet2021"
    heading, commands = missing(config)
    assert "(data.source=tfds:imagenet2021), did you mean tfds:imagenet2012" in heading
    assert "tfds build imagenet2012 " in commands[-2]
    assert commands[-1].endswith("--config.data.source=tfds:imagenet2012")


def test_a_weaker_flow_and_an_encoder_are_looked_for():
    finish("runs/rfm_dit")
    config = sample.get_config()
    config.weaker = "runs/rfm_dit_s"
    heading, commands = missing(config, "--config=configs/sample.py")
    assert "runs/rfm_dit_s (weaker)" in heading
    archive = "--config.data.source=array_record:data/imagenet"
    assert commands[-2] == f"{MAIN} --config=configs/rfm_dit.py:s {archive}"


def test_latents_are_made_by_encode():
    prepare_images()
    finish("runs/sae_stage4")
    config = rfm_dit.get_config()
    config.data.latents = "runs/encode"
    _, commands = missing(config, "--config=configs/rfm_dit.py")
    assert commands[0] == (
        f"{MAIN} --config=configs/encode.py --workdir=runs/encode "
        "--config.init_from=runs/sae_stage4"
    )
    write("runs/encode/train/manifest.json")
    assert missing(config) == ("", [])


def test_an_npz_of_samples_needs_no_autoencoder():
    config = evaluate.get_config()
    config.samples = config.reference = "x.npz"
    write("x1.npz")
    heading, commands = missing(config)
    assert heading.startswith("missing: x.npz (samples), did you mean x1.npz?")
    assert commands[0].startswith("name another file with")
    write("x.npz")
    assert missing(config) == ("", [])
    config.weights.inception = "weights/inception"
    heading, commands = missing(config)
    assert "FID's Inception (weights.inception=weights/inception, which does not exist)" in heading
    assert commands[0] == names.CONVERSIONS["inception"].command()


def test_jobs_that_need_nothing():
    assert missing(quickstart.get_config()) == ("", [])
    assert missing(reconstruct.get_config("tiny")) == ("", [])
    write("runs/old/DONE")
    assert missing(rfm_dit.get_config(), workdir="runs/old") == ("", [])


def test_a_chain_names_the_flag_of_its_stage():
    config = quickstart.get_config()
    config.stages.stage1.random_frozen_ok = ("dino",)
    _, commands = missing(config, "--config=configs/quickstart.py")
    assert commands[-1].endswith("--config.stages.stage1.weights.vit=weights/dinov3")


def test_what_several_stages_of_a_chain_lack_is_named_once():
    """Its flow reads the latents of an earlier stage, which nobody has to make by hand."""
    heading, commands = missing(imagenette.get_config("cpu"))
    assert heading.count("images (data.source=folder:imagenette)") == 1
    assert heading.count("weights.vit=weights/vits") == 1
    assert "latents" not in heading
    assert len(commands) == 3
