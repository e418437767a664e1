"""pytest tests/unit/test_storage.py   (S3: a real server process, nanio)"""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from selectmoe.errors import UserError
from selectmoe.storage import open_store, prove_store, split_s3


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    environment = {**os.environ, "NANIO_ACCESS_KEY": "user", "NANIO_SECRET_KEY": "right-secret"}
    command = [shutil.which("nanio", path=os.path.dirname(sys.executable)), "serve", "--data-dir", str(folder)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], env=environment)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def credentials(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "right-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_objects_come_back(kind, tmp_path, credentials):
    store = open_store("s3://bucket/work" if kind == "s3" else str(tmp_path / "work"))
    store.put_bytes("a/b", b"1")
    store.put_bytes("a/b", b"2")
    (tmp_path / "file").write_bytes(b"3" * 100_000)
    store.put_file("c", tmp_path / "file")
    assert store.names() == ["a/b", "c"]
    assert store.get("a/b") == b"2"
    assert store.get("none") is None
    assert store.fetch("c", tmp_path / "out" / "c")
    assert (tmp_path / "out" / "c").read_bytes() == b"3" * 100_000
    assert not store.fetch("none", tmp_path / "none")
    store.delete("c")
    store.delete("c")
    store.clear()
    assert store.names() == []


def test_right_credentials_prove(credentials):
    prove_store("s3://bucket/x")


@pytest.mark.parametrize(("uri", "secret"), [("s3://bucket/x", "wrong-secret"), ("s3://absent/x", "right-secret")])
def test_what_cannot_be_written_is_said(credentials, monkeypatch, uri, secret):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(UserError) as error:
        prove_store(uri)
    assert uri in str(error.value)
    assert secret not in str(error.value)


@pytest.mark.parametrize("uri", ["s3://", "s3://user:pw@bucket/x", "http://x/y"])
def test_bad_uris_are_refused(uri):
    with pytest.raises(UserError):
        split_s3(uri)
