"""Objects in buckets: what `etils.epath` and fsspec leave open for a run that lives in one.

An object is written whole, by one request, and is read as it was last written: what the libraries
would keep of listings is turned off. Faults that pass (429, 5xx, a lost connection, a time-out) are
retried by the libraries, for about half a minute, and said in a line. Others become one sentence.

Credentials come from the platform (application default credentials, instance roles), never from
an argument.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dinosae_jax import names

# One library for every path: not TensorFlow's where that is installed, no other protocol of GCS.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Place = str | os.PathLike[str]
TRANSIENT = ("429", "500", "502", "503", "504", "SlowDown", "InternalError", "ServiceUnavailable")
CONNECT_SECONDS, READ_SECONDS = 20, 60  # until a silent server counts as away
S3_TRIES = 11  # 29 s from the first to the last, with growing pauses; gcsfs: 31 s
SILENCE = 10.0  # seconds between two lines about faults
LIBRARIES = ("gcsfs", "s3fs", "google", "aiohttp", "aiobotocore", "botocore", "requests", "urllib3")


class Object(NamedTuple):
    """What a listing says: bytes, and a version that changes with every write."""

    size: int
    version: str


def is_bucket(place: Place) -> bool:
    """Whether a path is one in a bucket."""
    return os.fspath(place).startswith(tuple(f"{scheme}://" for scheme in names.SCHEMES))


@functools.cache
def set_up() -> None:
    """Configures fsspec, once, before the first file system is made."""
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    common = {"use_listings_cache": False}
    fsspec.config.conf["gcs"] = common | {"session_kwargs": {"timeout": timeout}}
    # s3fs retries by itself.
    fsspec.config.conf["s3"] = common | {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    for name in ("gcsfs", "s3fs"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(_Retries())
        logger.propagate = False
    with contextlib.suppress(ImportError):
        import s3fs

        s3fs.S3FileSystem.retries = S3_TRIES
        s3fs.core.set_custom_error_handler(_is_transient)


def _is_transient(error: Exception) -> bool:
    """Whether an error of S3 is worth another try."""
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    return code in TRANSIENT


class _Retries(logging.Handler):
    """Turns what the libraries note of faults into at most a line in `SILENCE` seconds."""

    said = -SILENCE

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line for a retry, and nothing for anything else."""
        text = record.getMessage()
        retried = "retrying after exception" in text or "etryable error" in text
        if retried and "onretryable" not in text and time.monotonic() - self.said >= SILENCE:
            self.said = time.monotonic()
            print(f"The bucket does not answer well, trying again ({_line(text)})", flush=True)


def require(place: Place) -> None:
    """Raises ValueError where a path is in a bucket that does not exist, or cannot be seen."""
    if not is_bucket(place):
        return
    with as_oserror(place):
        fs, key = _open(place)
        bucket = key.partition("/")[0]
        if not fs.exists(bucket):
            raise ValueError(
                f"a path in a bucket needs the bucket; got {os.fspath(place)}, and there is no "
                f"bucket {bucket} that this account sees; docs/cloud.md says how to make one"
            )


def listing(place: Place) -> dict[str, Object]:
    """Path below a folder -> object, of all objects; {'': ...} for the object of that name."""
    with as_oserror(place):
        fs, key = _open(place)
        found = fs.find(key, detail=True)
    return {
        name.removeprefix(key).lstrip("/"): Object(info["size"], _version(info))
        for name, info in found.items()
        if not name.endswith("/")
    }


def contents(folder: Place) -> dict[str, int | None]:
    """Names directly in a folder -> bytes of the object, None for a folder.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    with as_oserror(folder):
        fs, key = _open(folder)
        found = fs.ls(key, detail=True)
    sizes = {
        info["name"].rstrip("/"): None if info["type"] == "directory" else info["size"]
        for info in found
    }
    return {name.rpartition("/")[2]: sizes[name] for name in sizes if name != key}


def names_in(folder: Place) -> list[str]:
    """Names of the objects and folders directly in a folder, none where there is no such folder."""
    try:
        return list(contents(folder))
    except FileNotFoundError:
        return []


def matching(pattern: str) -> list[str]:
    """The objects that a pattern with `*`, `?` or `[` names, sorted."""
    with as_oserror(pattern):
        fs, key = _open(pattern)
        scheme = pattern.partition("://")[0]
        return sorted(f"{scheme}://{name}" for name in fs.glob(key) if fs.isfile(name))


def write(target: Place, data: bytes) -> None:
    """Writes an object whole."""
    with as_oserror(target):
        fs, key = _open(target)
        fs.pipe_file(key, data)


def upload(source: pathlib.Path, target: Place) -> None:
    """Copies a file of this machine to an object, which appears when it is complete."""
    with as_oserror(target):
        fs, key = _open(target)
        fs.put_file(str(source), key)


def download(source: Place, target: pathlib.Path) -> None:
    """Copies an object to a file of this machine."""
    with as_oserror(source):
        fs, key = _open(source)
        fs.get_file(key, str(target))


def move(folder: Place, target: Place) -> None:
    """Gives all objects of a folder another name: they are copied, then removed."""
    with as_oserror(folder):
        fs, key = _open(folder)
        _, new = _open(target)
        found = list(listing(folder))
        for name in found:
            fs.cp_file(f"{key}/{name}", f"{new}/{name}")
        fs.rm([f"{key}/{name}" for name in found])


def read_range(source: Place, offset: int, length: int) -> bytes:
    """Some bytes of an object, by one request."""
    with as_oserror(source):
        fs, key = _open(source)
        return fs.cat_file(key, start=offset, end=offset + length) if length else b""


def size(place: Place) -> int:
    """Bytes of an object."""
    with as_oserror(place):
        fs, key = _open(place)
        return fs.size(key)


def modified(place: Place) -> float:
    """When an object was written, in seconds since 1970 by the bucket's clock."""
    with as_oserror(place):
        fs, key = _open(place)
        return fs.modified(key).timestamp()


def read_version(place: Place) -> tuple[bytes, str | None]:
    """The content and version of one object; nothing and None where there is none."""
    with as_oserror(place):
        return (_read_gcs if str(place).startswith("gs://") else _read_s3)(place)


def write_if(place: Place, data: bytes, version: str | None) -> bool:
    """Writes an object where its version is still the one that was read; whether that was so.

    False too where the write succeeded and its answer was lost: who has to know reads again.

    Args:
      place: of the object.
      data: its new content.
      version: from `read_version`; None where there must be no such object.
    """
    with as_oserror(place):
        return (_write_gcs if str(place).startswith("gs://") else _write_s3)(place, data, version)


@contextlib.contextmanager
def as_oserror(place: Place) -> Iterator[None]:
    """Turns what the libraries raise into an OSError of one sentence that names the place."""
    try:
        yield
    except Exception as error:
        ours = is_bucket(place) and is_failure(error)
        if not ours or isinstance(error, FileExistsError | FileNotFoundError):
            raise
        raise OSError(f"{place}: {one_sentence(error)}") from error


def is_failure(error: BaseException) -> bool:
    """Whether an error comes from a bucket, or from the way to it."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | TimeoutError) or module in LIBRARIES


def one_sentence(error: BaseException) -> str:
    """What went wrong with a bucket, which permission or object is missing, and the way out."""
    text = _line(f"{error}" or type(error).__name__)
    if isinstance(error, FileNotFoundError):
        return f"there is no {text}; check its name"
    forbidden = ("Forbidden", "PERMISSION_DENIED", "AccessDenied", "Access Denied", "403")
    if isinstance(error, PermissionError) or any(word in text for word in forbidden):
        return f"{text}; give this machine's account the permission, docs/cloud.md says which"
    if "credential" in text.lower():
        return f"{text}; log this machine in, docs/cloud.md says how"
    return text


def _line(text: str) -> str:
    return " ".join(text.split())[:600]


def _open(place: Place) -> tuple[Any, str]:
    """The file system of a path, and its name in it."""
    import fsspec

    set_up()
    fs, key = fsspec.url_to_fs(os.fspath(place))
    return fs, key.rstrip("/")


def _version(info: dict[str, Any]) -> str:
    return str(info.get("generation") or info.get("ETag") or info.get("mtime"))


@functools.cache
def _gcs_client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _blob(place: Place) -> Any:
    bucket, _, name = os.fspath(place).removeprefix("gs://").partition("/")
    return _gcs_client().bucket(bucket).blob(name)


def _read_gcs(place: Place) -> tuple[bytes, str | None]:
    from google.api_core import exceptions

    while True:
        blob = _blob(place)
        try:
            blob.reload()
            return blob.download_as_bytes(if_generation_match=blob.generation), str(blob.generation)
        except exceptions.NotFound:
            if not blob.exists():
                return b"", None
        except exceptions.PreconditionFailed:
            continue  # written in between


def _write_gcs(place: Place, data: bytes, version: str | None) -> bool:
    from google.api_core import exceptions

    try:
        _blob(place).upload_from_string(data, if_generation_match=int(version or 0))
    except exceptions.PreconditionFailed:
        return False
    return True


def _read_s3(place: Place) -> tuple[bytes, str | None]:
    fs, key = _open(place)
    while True:
        try:
            before, data, after = fs.info(key), fs.cat_file(key), fs.info(key)
        except FileNotFoundError:
            return b"", None
        if before["ETag"] == after["ETag"]:
            return data, str(after["ETag"])


def _write_s3(place: Place, data: bytes, version: str | None) -> bool:
    fs, key = _open(place)
    bucket, _, name = key.partition("/")
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    try:
        fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, **condition)
    except (FileNotFoundError, FileExistsError):
        return False
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        code = response.get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            return False
        raise
    return True
