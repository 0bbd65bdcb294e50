"""Draws images from a trained flow and writes them as one picture, one row per class.

    python examples/sample.py runs/quickstart/flow --labels 2 8 9 --sampler=dpm2m --steps=10

A sample depends on the key, its index and its label alone: neither the batch size nor the number
of devices changes it.
"""

import argparse
import time

import jax
import numpy as np
from PIL import Image

import dinosae_jax
from dinosae_jax.flow.samplers import SAMPLERS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="workdir of a flow, or an export")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per_class", type=int, default=4)
    parser.add_argument("--steps", type=int, help="the flow's own number where not given")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="the flow's own otherwise")
    parser.add_argument("--guidance", type=float, help="1 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="samples.png")
    args = parser.parse_args()

    generator = dinosae_jax.Generator.load(args.weights)
    for note in generator.notes:
        print(f"note: {note}")

    start = time.perf_counter()
    images = generator.sample(
        np.repeat(args.labels, args.per_class),
        key=jax.random.PRNGKey(args.seed),
        steps=args.steps,
        sampler=args.sampler,
        guidance=args.guidance,
    )
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s, compilation included")

    rows = [np.concatenate(list(row), axis=1) for row in np.split(images, len(args.labels))]
    sheet = np.concatenate(rows, axis=0)
    Image.fromarray((255 * sheet).round().astype(np.uint8)).save(args.output)
    names = ", ".join(generator.label_names[label] for label in args.labels)
    print(f"wrote {args.output}: {names}")


if __name__ == "__main__":
    main()
