"""pytest tests/unit/test_download.py   (a real S3 server, nanio, behind a proxy that breaks things)"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from s3_faults import Fault

from selectmoe import download, storage
from selectmoe.errors import UserError
from selectmoe.storage import S3Store

PART = 5 << 20
"""The smallest part that S3 takes."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    for module in (download, storage):
        monkeypatch.setattr(module, "PART", PART)
    monkeypatch.setattr(download, "back_off", lambda failures: None)


@pytest.fixture(scope="module")
def data():
    return random.Random(0).randbytes(2 * PART + 12345)


@pytest.fixture
def stored(s3, data, request):
    """A store with the object `big`, behind the proxy; what filling it took is forgotten."""
    store = S3Store(f"s3://bucket/{re.sub('[^a-z0-9]', '-', request.node.name)}")
    store.put_bytes("big", data)
    s3.seen.clear()
    return store


def test_an_upload_survives_what_happens_and_sends_no_part_twice(s3, data, tmp_path):
    (tmp_path / "big").write_bytes(data)
    s3.faults = [
        Fault("status", "PUT", "partNumber=1", status=503),
        Fault("reset-request", "PUT", "partNumber=2", after=1 << 20),
        Fault("status", "PUT", "partNumber=3", status=429),
        Fault("status", "POST", "uploads", status=500),
        Fault("slow", "PUT", "partNumber=1", seconds=0.2),
    ]
    store = S3Store("s3://bucket/up")
    store.put_file("big", tmp_path / "big")
    assert store.get("big") == data
    assert not [f for f in s3.faults if f.times]
    kept = s3.requests("PUT", "partNumber=", 200)
    assert sorted(path.split("partNumber=")[1][0] for _, path, _, _ in kept) == ["1", "2", "3"]


def test_small_objects_survive_too(s3):
    s3.faults = [Fault("status", "PUT"), Fault("reset-response", after=100)]
    store = S3Store("s3://bucket/small")
    store.put_bytes("a", b"x" * 1000)
    assert store.get("a") == b"x" * 1000


def test_a_download_goes_on_where_a_body_broke(s3, stored, data, tmp_path):
    s3.faults = [
        Fault("cut", match="/big", after=2 << 20),
        Fault("status", match="/big", status=503),
        Fault("status", match="/big", status=429),
        Fault("slow", match="/big", seconds=0.2),
    ]
    assert stored.fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data
    starts = [int(r[len("bytes=") :].split("-")[0]) for _, _, r, status in s3.requests("GET", "/big") if status == 206]
    assert len(starts) == 4, "three parts, and the rest of the one that broke"
    assert [start for start in starts if start % PART] != [], "it did not begin that part again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big"]


def test_resets_in_mid_body(s3, stored, data, tmp_path):
    s3.faults = [Fault("reset-response", match="/big", after=1 << 20, times=4)]
    assert stored.fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data


@pytest.mark.parametrize("kind", ["as-200", "whole"])
def test_servers_that_answer_200_to_a_range(s3, stored, data, tmp_path, kind):
    s3.faults = [Fault(kind, match="/big", times=100)]
    assert stored.fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data


def test_a_killed_download_keeps_its_parts(s3, stored, data, tmp_path):
    s3.faults = [Fault("none", match="/big", times=2), Fault("slow", match="/big", seconds=60)]
    code = (
        "import sys; from selectmoe import download, storage\n"
        f"download.PART = storage.PART = {PART}; download.PARALLEL = 1\n"
        "storage.S3Store(sys.argv[1]).fetch('big', sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, stored.uri().rstrip("/"), str(tmp_path / "big")])
    journal = tmp_path / ".big.part.json"
    while not (journal.is_file() and f"{PART}]" in journal.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "big").exists()
    s3.seen.clear()
    assert stored.fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data
    assert [r for _, _, r, _ in s3.requests("GET", "/big")] == [f"bytes={2 * PART}-{len(data) - 1}"]


def test_a_changed_object_is_never_mixed(s3, stored, data, tmp_path, monkeypatch):
    changed = data[::-1]
    monkeypatch.setattr(download, "PARALLEL", 1)
    reads = []

    def change_before_the_second_part(method, path):
        if method == "GET" and "/big" in path:
            reads.append(path)
            if len(reads) == 2:
                S3Store(stored.uri().rstrip("/")).put_bytes("big", changed)

    s3.before = change_before_the_second_part
    assert stored.fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == changed


def test_what_does_not_have_its_digest_is_refused(s3, stored, data, tmp_path):
    entry = stored.stat("big")
    with pytest.raises(UserError, match="does not have the bytes that are expected"):
        stored.fetch_files([(entry, tmp_path / "big", "0" * 64)], "test")
    assert list(tmp_path.iterdir()) == []
    path = s3.folder / "bucket" / stored.prefix / "big"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(UserError, match="does not have the bytes"):
        stored.fetch("big", tmp_path / "big")
    with pytest.raises(UserError, match="does not have the bytes"):
        stored.get("big")
    assert list(tmp_path.iterdir()) == []


def test_an_etag_that_is_no_md5_makes_it_read_back(s3, monkeypatch):
    monkeypatch.setattr(storage, "_md5", lambda data: "encrypted")
    store = S3Store("s3://bucket/opaque")
    store.put_bytes("a", b"1")
    assert len(s3.requests("GET", "/opaque/a")) == 1
    monkeypatch.setattr(storage, "stream", lambda *args: args[3](0, b"2") and {})
    with pytest.raises(OSError, match="did not keep the bytes"):
        store.put_bytes("a", b"1")
    assert store.stat("a") is None


def test_empty_files_and_many_at_once(s3, tmp_path):
    files = {}
    for n in range(20):
        files[f"d{n % 3}/f{n}"] = tmp_path / f"{n}"
        files[f"d{n % 3}/f{n}"].write_bytes(b"z" * n)
    store = S3Store("s3://bucket/many")
    store.put_files(files, "to")
    store.fetch_files([(e, tmp_path / "out" / e.name, "") for e in store.entries()], "from")
    for name, path in files.items():
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()
