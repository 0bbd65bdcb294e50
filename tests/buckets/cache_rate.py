"""How fast a latent cache in a bucket is read, beside the rate of reading its objects raw.

    python -m tests.buckets.cache_rate gs [MEGABYTES]

A cache of random latents is written into the bucket. Its shards are read raw: as objects, all at
once, by the client that everything in buckets uses. Then the cache is read as training does it,
every record once in the shuffled order of batches, with no copy on this machine: opened, copied and
read; the same with the sha256 of a cache that is small enough to have it compared; and again from
the copy. All of it is done `TIMES` times, in turns, and the medians count. Exits with 1 where the
first pass without sha256 is slower than `LEAST` of raw: caches as large as real ones have none.
"""

import collections
import concurrent.futures
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

from tests.buckets import servers

LEAST = 0.7
TIMES = 3
BATCH = 16
SHARDS = 4
TOKENS, WIDTH = 256, 1024  # half a megabyte in bfloat16
DATA = {
    "source": "folder:none",
    "holdout": 0,
    "crop": "center",
    "image_size": 256,
    "flip": False,
    "threads": 2,
}


def write(folder, images, tokens=TOKENS, width=WIDTH):
    """Writes the split `train` of a cache; returns the data config that reads it."""
    from dinosae_jax.data.latents import latent_reader, latent_writer

    plan = {
        "format": "bfloat16",
        "tokens": tokens,
        "width": width,
        "flipped": False,
        "label_names": ["one"],
        "count": images,
        "num_shards": SHARDS,
        "images": latent_reader.image_recipe(DATA),
    }
    random = np.random.default_rng(0)

    def encoded(count):
        for _ in range(count):
            found = random.standard_normal((1, 1, tokens, width), np.float32)
            yield found, np.zeros(1, np.int32)

    place = folder / "train"
    latent_writer.claim(place, plan)
    for number in range(SHARDS):
        shard = encoded(len(latent_writer.shard_range(plan, number)))
        latent_writer.write_shard(place, plan, number, shard)
    latent_writer.finish(place, plan)
    return DATA | {"latents": str(folder)}


def raw(objects):
    """Bytes that are read of whole objects."""
    from dinosae_jax.runtime import buckets, snapshots

    def read(item):
        return len(buckets.read_range(item[0], 0, item[1]))

    with concurrent.futures.ThreadPoolExecutor(snapshots.THREADS) as pool:
        return sum(pool.map(read, objects.items()))


def train(data):
    """Bytes of records that are read in one pass of training over a cache."""
    from dinosae_jax.data.latents import latent_reader

    source = latent_reader.open_latents(data, "train")
    batches = latent_reader.train_batches(source, data, batch_size=BATCH, seed=0)
    return sum(next(batches)["latent"].nbytes for _ in range(len(source) // BATCH))


def rate(read, *arguments):
    began = time.perf_counter()
    return read(*arguments) / 1e6 / (time.perf_counter() - began)


def run(scheme, megabytes, place):
    """Prints the rates; returns that of a first pass without sha256 as a part of the raw one."""
    from dinosae_jax.data.latents import latent_reader
    from dinosae_jax.runtime import buckets, files

    folder = files.path(f"{scheme}://{servers.BUCKET}/latents")
    images = int(megabytes * 1e6 / (2 * TOKENS * WIDTH)) // BATCH * BATCH
    data = write(folder, images)
    found = buckets.listing(folder / "train")
    shards = {f"{folder}/train/{n}": each.size for n, each in found.items() if "array" in n}
    hashed, rates = latent_reader.HASHED_BYTES, collections.defaultdict(list)
    for number in range(TIMES):
        rates["raw"].append(rate(raw, shards))
        for name, most in (("first pass", 0), ("first pass with sha256", hashed)):
            latent_reader.HASHED_BYTES = most
            os.environ["DINOSAE_CACHE"] = str(place / f"{name}{number}")
            rates[name].append(rate(train, data))
        latent_reader.HASHED_BYTES = 0
        rates["second pass"].append(rate(train, data))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{scheme}, {sum(shards.values()) / 1e6:.0f} MB:")
    for name, median in medians.items():
        print(f"{name:>24} {median:6.0f} MB/s {median / medians['raw']:6.0%}")
    return medians["first pass"] / medians["raw"]


if __name__ == "__main__":
    scheme, *rest = sys.argv[1:]
    with servers.serving(scheme) as server, tempfile.TemporaryDirectory() as temporary:
        os.environ.update(server.environment())
        ratio = run(scheme, float(rest[0]) if rest else 200.0, pathlib.Path(temporary))
    sys.exit(ratio < LEAST)
