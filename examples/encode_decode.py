"""Encodes a photo, decodes it again, and shows what the norm of the latents is worth.

    python examples/encode_decode.py runs/quickstart/stage4 --photo=my.jpg --output=photo.png

The picture has the photo, its reconstruction, and reconstructions of latents whose norms were
halved and doubled. Without --photo it is the astronaut of scikit-image.
"""

import argparse

import numpy as np
import skimage.data
from PIL import Image

import dinosae_jax


def read_photo(path):
    """The photo as [1, h, w, 3] in [0, 1], sides cropped to multiples of 16."""
    pixels = np.asarray(Image.open(path).convert("RGB")) if path else skimage.data.astronaut()
    height, width = (side - side % 16 for side in pixels.shape[:2])
    return pixels[None, :height, :width].astype(np.float32) / 255.0


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [0, 1], in decibels."""
    return -10 * np.log10(np.mean((a - b) ** 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="workdir of a stage, an export or converted weights")
    parser.add_argument("--photo", help="a JPEG or PNG file")
    parser.add_argument("--output", default="photo.png")
    args = parser.parse_args()

    autoencoder = dinosae_jax.Autoencoder.load(args.weights)
    photo = read_photo(args.photo)
    grid = (photo.shape[1] // 16, photo.shape[2] // 16)

    z = autoencoder.encode(photo)
    norms = np.linalg.norm(z, axis=-1)
    print(
        f"{photo.shape[1:]} -> latents {z.shape[1:]}, norms {norms.min():.2f} to {norms.max():.2f}"
    )

    pictures = [photo]
    for scale in (1.0, 0.5, 2.0):  # the direction of every token stays
        pictures.append(autoencoder.decode(scale * z, grid))
        print(f"norms x {scale}: PSNR {psnr(pictures[-1], photo):.2f} dB")

    row = np.concatenate(pictures, axis=2)[0]
    Image.fromarray((255 * row).round().astype(np.uint8)).save(args.output)
    print(f"wrote {args.output}: photo, reconstruction, norms halved, norms doubled")


if __name__ == "__main__":
    main()
