"""Arrays of checkpoints in buckets, which TensorStore reads and writes by its own drivers.

Orbax knows `gs://` and takes every other path for one of a disk. `teach_orbax` tells it of
TensorStore's driver of `s3://` too; all but the arrays goes through `etils.epath` already.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

S3 = "s3://"


@functools.cache
def teach_orbax() -> None:
    """Makes Orbax store arrays below `s3://`, once."""
    of_gcs, is_gcs = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._use_gcs_driver
    normalized = tensorstore_utils._normalize_path

    def driver(path: str) -> dict[str, Any]:
        return s3_driver(path) if path.startswith(S3) else of_gcs(path)

    def normalize(path: str) -> str:
        return S3 + normalized(path.removeprefix(S3)) if path.startswith(S3) else normalized(path)

    tensorstore_utils._normalize_path = normalize
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(S3) or is_gcs(path)
    gcs_utils.get_kvstore_for_gcs = driver


def s3_driver(path: str) -> dict[str, Any]:
    """TensorStore's key-value store of a path, at the endpoint $AWS_ENDPOINT_URL if it is set."""
    bucket, _, name = path.removeprefix(S3).partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": name}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return spec
