"""What several unit tests need beside `tests/conftest.py`: a core of their own, a real S3 server (nanio)."""

import os

import hypothesis
import pytest
from s3_faults import Proxy

from tests.serving import S3Server

hypothesis.settings.register_profile("any speed", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("any speed")

# Every test process takes its own share of the cores: two of two threads each would wait for each other. Not so in the
# integration tests, whose many short processes the system places better.
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = sorted(os.sched_getaffinity(0))
if len(CORES) >= WORKERS > 1:
    os.sched_setaffinity(0, CORES[int(WORKER.removeprefix("gw")) :: WORKERS])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """An S3 server with the bucket `bucket`."""
    server = S3Server(tmp_path_factory.mktemp("s3"), "bucket")
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path_factory):
    """The S3 server behind a proxy, with right credentials, and an empty model cache; the proxy."""
    proxy = Proxy(s3_server.url, s3_server.folder)
    for name, value in s3_server.environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield proxy
    proxy.close()
