"""A latent cache in a bucket is fetched once, also to compare its sha256."""

import pytest

from dinosae_jax.runtime import buckets, files
from tests.buckets import cache_rate

pytestmark = pytest.mark.slow
IMAGES, TOKENS, WIDTH = 4 * cache_rate.BATCH, 2, 8


def test_every_shard_is_fetched_once(scheme, folder, between):
    data = cache_rate.write(folder, IMAGES, TOKENS, WIDTH)
    sign = "alt=media" if scheme == "gs" else ".array_record"
    fetched = []

    def note(method, path):
        if method == "GET" and ".array_record" in path and sign in path and "list-type" not in path:
            fetched.append(path)
        return ""

    between.plan = note
    for _ in range(2):
        assert cache_rate.train(data) == 2 * IMAGES * TOKENS * WIDTH
        assert len(fetched) == cache_rate.SHARDS, fetched


def test_a_shard_that_is_another_is_refused(folder):
    data = cache_rate.write(folder, IMAGES, TOKENS, WIDTH)
    shard = next(name for name in buckets.listing(folder / "train") if "array_record" in name)
    content = (folder / "train" / shard).read_bytes()
    files.write_bytes(folder / "train" / shard, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"got {folder}/train/{shard}, whose content has changed"):
        cache_rate.train(data)
