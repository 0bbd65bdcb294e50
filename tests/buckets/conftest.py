"""Buckets on servers of this machine, started once; the packages may be missing."""

import os
import uuid

import pytest

from tests.buckets import proxy, servers


@pytest.fixture(scope="session")
def places():
    """Scheme -> (server, proxy) of those that were started."""
    started = {}
    yield started
    for server, between in started.values():
        between.shutdown()
        server.kill()


def start(scheme, places, tmp_path_factory):
    """Starts the server of a scheme and leads all client libraries to its proxy."""
    if scheme not in places:
        server = servers.Server(scheme, tmp_path_factory.mktemp(scheme))
        between = proxy.Proxy(server.port)
        server.url = between.url
        places[scheme] = server.start(), between
        os.environ.update(server.environment())
    return places[scheme]


@pytest.fixture(params=["gs", "s3"])
def scheme(request):
    """Each kind of bucket that can be served here."""
    servers.require(request.param)
    return request.param


@pytest.fixture
def between(scheme, places, tmp_path_factory):
    """The proxy before the server, which passes everything on again afterwards."""
    _, found = start(scheme, places, tmp_path_factory)
    plan = found.plan
    yield found
    found.plan = plan


@pytest.fixture
def folder(scheme, between):
    """An empty folder of a bucket."""
    from dinosae_jax.runtime import files

    return files.path(f"{scheme}://{servers.BUCKET}/{uuid.uuid4().hex[:8]}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Copies of objects are kept in a folder of the test."""
    monkeypatch.setenv("DINOSAE_CACHE", str(tmp_path / "copies"))
    return tmp_path / "copies"
