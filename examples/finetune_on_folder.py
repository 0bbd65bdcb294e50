"""Fine-tunes the decoder of a trained stage on a folder of your own photographs.

    python examples/finetune_on_folder.py runs/quickstart/stage4 my_photos --workdir=runs/mine

The encoder stays as it is, so latents keep their meaning and flows trained on them stay valid. A
run's config.json is a complete config: this reads it, changes what differs, and trains. Every fifth
photo is held out, and the PSNR on these is printed before and after. Run it again to resume.
"""

import argparse
import json
import pathlib

import ml_collections
import numpy as np
from PIL import Image, ImageOps

import dinosae_jax
from dinosae_jax import rules
from dinosae_jax.jobs import train

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HOLDOUT = 5


def tuples(fields):
    """JSON has lists where a config has tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def make_config(start, photos, steps):
    """The config of the run in `start`, changed to fine-tune its decoder on `photos`."""
    fields = json.loads((start / "config.json").read_text(), object_hook=tuples)
    config = ml_collections.ConfigDict(fields)
    config.update(name="finetune", init_from=str(start), trainable=("decoder",), steps=steps)
    config.losses.update(cosine=0.0, mse=0.0, gan=0.0)  # L1 and, with weights, LPIPS
    config.latent_noise.update(tau=0.0, tau_end=0.0, ramp_steps=0)
    config.data.update(source=f"folder:{photos}", holdout=HOLDOUT, crop="resize_random")
    config.data.resize = config.data.image_size * 3 // 2  # of the short side, before the crop
    config.optimizer.update(warmup_steps=0, schedule="cosine", final_learning_rate=0.0)
    config.eval.every = config.checkpoint.every = max(steps // 4, 1)
    rules.validate(config)
    return config


def held_out(photos, side):
    """The photos that training does not see, as square crops [b, side, side, 3] in [0, 1]."""
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    crops = [ImageOps.fit(Image.open(path).convert("RGB"), (side, side)) for path in paths]
    return np.stack(crops[::HOLDOUT]).astype(np.float32) / 255.0


def psnr_of(weights, images):
    """Mean PSNR of the reconstructions of images, in decibels."""
    reconstructions = dinosae_jax.Autoencoder.load(weights).reconstruct(images)
    errors = np.mean((reconstructions - images) ** 2, axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(errors)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=pathlib.Path, help="workdir of a trained stage")
    parser.add_argument("photos", type=pathlib.Path, help="a folder of at least five photographs")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/finetune"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    config = make_config(args.start, args.photos, args.steps)
    images = held_out(args.photos, config.data.image_size)
    before = psnr_of(args.start, images)
    train.run(config, args.workdir)
    after = psnr_of(args.workdir, images)
    print(f"{len(images)} held-out photos: {before:.2f} dB before, {after:.2f} dB after")


if __name__ == "__main__":
    main()
