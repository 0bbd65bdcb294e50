"""All four stages on two real photographs, overfitted: the losses pull where they should."""

import json

import pytest
from PIL import Image

from configs import sae_stage1, sae_stage2, sae_stage3, sae_stage4
from dinosae_jax.data import crops, photos
from dinosae_jax.jobs import train

STEPS = {sae_stage1: 400, sae_stage2: 40, sae_stage3: 40, sae_stage4: 80}


@pytest.mark.slow
def test_four_stages_overfit_two_photographs(tmp_path):
    for split in ("train", "eval"):
        folder = tmp_path / "photos" / split / "all"
        folder.mkdir(parents=True)
        for name in ("chelsea", "coffee"):
            photo = crops.decode_rgb(photos.photo_path(name).read_bytes())
            Image.fromarray(crops.adm_center_crop(photo, 64)).save(folder / f"{name}.png")
    previous = ""
    for number, (module, steps) in enumerate(STEPS.items(), start=1):
        config = module.get_config("tiny")
        config.steps, config.init_from, config.batch_size = steps, previous, 8
        config.optimizer.schedule, config.optimizer.final_learning_rate = "cosine", 1e-5
        config.data.source = f"folder:{tmp_path / 'photos'}"
        config.data.crop = "center"
        config.log_every = config.eval.every = config.checkpoint.every = steps
        workdir = tmp_path / f"stage{number}"
        train.run(config, workdir)
        previous = str(workdir)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        psnr = lines[-1]["eval/psnr"]
        print(f"stage {number}: {psnr:.2f} dB")
        assert psnr >= 30.0, f"stage {number}"
