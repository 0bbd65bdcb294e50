"""Five-nearest-neighbour accuracy of a converted encoder on a folder of classes, layer by layer.

    python examples/nearest_neighbours.py weights/dinov2 --images=imagenette --blocks 8 9 10 11

The folder has train/CLASS/*.jpg and val/CLASS/*.jpg. A layer is the tokens after so many blocks,
through the final norm; features are the class token and the mean patch token, compared by cosine.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dinosae_jax import encoders
from dinosae_jax.models import preprocessing, registry
from dinosae_jax.models.vit import VisionTransformer
from dinosae_jax.weights import conversion

BATCH = 50


def read_split(folder, each, side):
    """Centre squares of each class, [b, side, side, 3] in [0, 1], and their labels."""
    images, labels = [], []
    for label, place in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in sorted(place.iterdir())[:each]:
            picture = Image.open(path).convert("RGB")
            short = min(picture.size)
            left, top = ((length - short) // 2 for length in picture.size)
            square = picture.crop((left, top, left + short, top + short))
            images.append(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)))
            labels.append(label)
    return np.stack(images).astype(np.float32) / 255, np.array(labels)


def features(loaded, family, images):
    """Class token and mean patch token after each block, [2, depth, b, d], of norm 1."""
    module = registry.build("vit", loaded.config["vit"])
    variables = loaded.variables["vit"]

    @jax.jit
    def extract(batch):
        prepared = preprocessing.fit(batch, family.preprocessing, batch.shape[1:3])
        patches = module.apply(variables, prepared, method=VisionTransformer.embed_patches)
        output = module.apply(variables, patches, intermediates=True)
        tokens = module.apply(
            variables, output.intermediates["out"], method=lambda vit, x: vit.norm(x)
        )
        first = output.prenorm.shape[1] - output.patches.shape[1]
        mean = tokens[:, :, first:].mean(axis=2)
        rows = jnp.stack([tokens[:, :, 0] if module.class_token else mean, mean])
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    parts = [extract(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return np.concatenate(parts, axis=2)


def accuracy(rows, labels, known, known_labels, neighbours=5):
    """Share of rows whose nearest neighbours vote for their class; of a tie the lowest class."""
    nearest = np.argsort(-rows @ known.T, axis=1, kind="stable")[:, :neighbours]
    votes = [np.bincount(known_labels[row]).argmax() for row in nearest]
    return float(np.mean(votes == labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="what weights_conversion.convert wrote")
    parser.add_argument("--images", type=pathlib.Path, required=True)
    parser.add_argument("--side", type=int, default=112, help="pixels that the encoder sees")
    parser.add_argument("--train", type=int, default=40, help="images of each class")
    parser.add_argument("--val", type=int, default=30, help="images of each class")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 9, 10, 11])
    args = parser.parse_args()

    loaded = conversion.load(args.weights, ("vit",))
    family = encoders.family(loaded.metadata.get("model", {}))
    known, known_labels = read_split(args.images / "train", args.train, args.side)
    held, labels = read_split(args.images / "val", args.val, args.side)
    train, val = (features(loaded, family, images) for images in (known, held))
    for blocks in args.blocks:
        at = blocks - 1
        found = [accuracy(val[i, at], labels, train[i, at], known_labels) for i in (0, 1)]
        print(f"{blocks} blocks: class token {found[0]:.3f}, mean patch {found[1]:.3f}")


if __name__ == "__main__":
    main()
