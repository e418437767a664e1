"""What several unit tests need beside `tests/conftest.py`: a core of their own, a real S3 server (nanio)."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from s3_faults import Proxy

# Every test process takes its own share of the cores: two of two threads each would wait for each other. Not so in the
# integration tests, whose many short processes the system places better.
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = sorted(os.sched_getaffinity(0))
if len(CORES) >= WORKERS > 1:
    os.sched_setaffinity(0, CORES[int(WORKER.removeprefix("gw")) :: WORKERS])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """Address and folder of an S3 server with the bucket `bucket`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    environment = {**os.environ, "NANIO_ACCESS_KEY": "user", "NANIO_SECRET_KEY": "right-secret"}
    command = [shutil.which("nanio", path=os.path.dirname(sys.executable)), "serve", "--data-dir", str(folder)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], env=environment)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}", folder
    server.kill()
    server.wait()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path_factory):
    """The S3 server behind a proxy, with right credentials, and an empty model cache; the proxy."""
    proxy = Proxy(*s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "right-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield proxy
    proxy.close()
