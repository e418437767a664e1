"""Rows on S3, read in ranges: pytest tests/unit/test_sources_s3.py   (a real S3 server, nanio, behind a proxy)"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_faults import Fault, Proxy

from selectmoe import cache, download, sources_s3
from selectmoe.config import load
from selectmoe.errors import Unavailable, UserError
from selectmoe.ingest import IngestConfig, run
from selectmoe.manifest import read_manifest, tree_identity
from selectmoe.pool import locate, read_pool
from selectmoe.records import Reading, Record, pieces_of
from selectmoe.sources import DatasetConfig, data_identity, find
from selectmoe.sources_s3 import S3Object, objects_at, s3_datasets
from selectmoe.storage import S3Store


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name.replace('_', '-').replace('[', '-').replace(']', '')}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_s3, "BLOCK", 10_000)
    monkeypatch.setattr(download, "back_off", lambda failures: None)


def record(n: int) -> dict[str, Any]:
    answer = " ".join(random.Random(n).choices(["rain", "cloud", "river", "stone"], k=40))
    return {
        "id": f"r{n}",
        "messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": answer}],
    }


def lines(first: int, last: int) -> bytes:
    return "".join(json.dumps(record(n)) + "\n" for n in range(first, last)).encode()


def put(s3: Proxy, uri: str, name: str, data: bytes) -> Path:
    path = s3.folder / "bucket" / uri.removeprefix("s3://bucket/") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def data_folder(s3: Proxy, uri: str) -> Path:
    """Two datasets in several formats, a hidden file and one of no kind; the folder that the server has."""
    put(s3, uri, "cot/a.jsonl", lines(0, 120))
    put(s3, uri, "cot/sub/b.jsonl.gz", gzip.compress(lines(120, 180), mtime=0))
    put(s3, uri, "cot/README.md", b"read me")
    put(s3, uri, "cot/.backup/a.jsonl", lines(0, 10))
    put(s3, uri, ".hidden.jsonl", lines(0, 10))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([record(n) for n in range(180, 300)]), table, row_group_size=25)
    put(s3, uri, "dolly.parquet", table.getvalue())
    return s3.folder / "bucket" / uri.removeprefix("s3://bucket/")


def records(source: Any) -> list[Record]:
    return [record for piece in pieces_of(source) for record in Reading(piece)]


def one(s3: Proxy, uri: str, data: bytes) -> S3Object:
    put(s3, uri, "x.jsonl", data)
    return objects_at(f"{uri}/x.jsonl", "data")[0][0]


def test_the_same_bytes_are_the_same_datasets_with_the_same_identities_here_and_there(
    s3: Proxy, uri: str, tmp_path: Path
) -> None:
    there = data_folder(s3, uri)
    here = shutil.copytree(there, tmp_path / "data")
    on_s3, on_disk = find(uri, DatasetConfig()), find(str(here), DatasetConfig())
    assert list(on_s3) == list(on_disk) == ["cot", "dolly"]
    for name, dataset in on_s3.items():
        assert dataset.identify() == on_disk[name].identify()
        assert dataset.several == on_disk[name].several
        assert dataset.uri == f"{uri}/{Path(on_disk[name].uri).name}"
        for a, b in zip(dataset.sources, on_disk[name].sources, strict=True):
            assert (a.place, a.kind, a.compression, a.size) == (b.place, b.kind, b.compression, b.size)
            assert records(a) == records(b)
    assert data_identity(uri) == data_identity(f"{uri}/") == tree_identity(here)
    single = find(f"{uri}/dolly.parquet", DatasetConfig())["dolly"]
    assert single.identify() == tree_identity(here / "dolly.parquet") == data_identity(f"{uri}/dolly.parquet")
    assert single.uri == f"{uri}/dolly.parquet"
    assert list(s3_datasets(uri, "data", ["dolly"])) == ["dolly"]


def test_ingest_reads_ranges_keeps_nothing_and_gives_what_a_local_folder_gives(
    s3: Proxy, uri: str, tmp_path: Path
) -> None:
    here = shutil.copytree(data_folder(s3, uri), tmp_path / "data")
    local = run(load(IngestConfig, {"holdout": 20}, data=str(here), output_dir=str(tmp_path / "local")))
    ways = {
        "given": {"data": uri},
        "key": {"dataset": {"dataset_from": "s3", "s3": {"data_dir": uri}}},
        "download": {"data": uri, "dataset": {"s3": {"download": True}}},
    }
    for way, given in ways.items():
        out = run(load(IngestConfig, {"holdout": 20, **given}, output_dir=str(tmp_path / way)))
        assert read_manifest(out).identity == read_manifest(local).identity, way
        assert read_pool(locate(out)) == read_pool(locate(local))
        assert read_manifest(out).inputs["data.cot"]["uri"].endswith("/cot")
        kept = list(cache.root().rglob("*.parquet"))
        assert bool(kept) == (way == "download")
    assert s3.requests("GET", "a.jsonl", 206)


def test_several_processes_read_pieces_of_the_objects(
    s3: Proxy, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selectmoe.records.PIECE", 20_000)
    here = shutil.copytree(data_folder(s3, uri), tmp_path / "rows")
    ways = {"one": (uri, 1), "three": (uri, 3), "local": (str(here), 2)}
    made = [
        run(load(IngestConfig, {"holdout": 20, "workers": n}, data=data, output_dir=str(tmp_path / way)))
        for way, (data, n) in ways.items()
    ]
    assert len({read_manifest(out).identity for out in made}) == 1
    assert len({span for _, _, span, _ in s3.requests("GET", "a.jsonl", 206)}) > 3


def test_what_was_digested_once_is_not_read_again_for_its_digest(s3: Proxy, uri: str) -> None:
    data_folder(s3, uri)
    first = data_identity(uri)
    s3.seen.clear()
    assert data_identity(uri) == first
    assert not s3.requests("GET", "a.jsonl")
    put(s3, uri, "cot/a.jsonl", lines(1, 121))
    assert data_identity(uri) != first
    assert s3.requests("GET", "a.jsonl")


def test_blocks_come_ahead_in_parallel_and_few_are_held(s3: Proxy, uri: str) -> None:
    data = random.Random(0).randbytes(155_000)
    source = one(s3, uri, data)
    running = most = 0
    lock = threading.Lock()
    real = sources_s3.fetch

    def counted(*args: Any) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return real(*args)
        finally:
            with lock:
                running -= 1

    s3.faults = [Fault("slow", match="x.jsonl", times=16, seconds=0.05)]
    sources_s3.fetch = counted
    try:
        with sources_s3.Ranges(source) as ranges:
            read = b""
            while more := ranges.read(3000):
                read += more
                assert len(ranges._blocks) <= sources_s3.HELD
    finally:
        sources_s3.fetch = real
    assert read == data
    assert 1 < most <= sources_s3.AHEAD
    assert len(s3.requests("GET", "/x.jsonl", 206)) == 16, "every block once"


def test_a_file_can_seek_and_reads_no_more_than_it_must(s3: Proxy, uri: str) -> None:
    data = random.Random(1).randbytes(155_000)
    source = one(s3, uri, data)
    s3.seen.clear()
    with source.open() as file:
        file.seek(-100, io.SEEK_END)
        assert file.read() == data[-100:]
        assert file.tell() == len(data)
        assert file.read(1) == b""
        assert len(s3.requests("GET", "/x.jsonl", 206)) == 1, "nothing comes ahead of a jump"
        rng = random.Random(2)
        for _ in range(50):
            at, size = rng.randrange(len(data)), rng.randrange(30_000)
            file.seek(at)
            assert file.read(size) == data[at : at + size]
    s3.seen.clear()
    with source.open(end=35_000) as file:
        assert file.read(20_000) == data[:20_000]
        assert len(s3.requests("GET", "/x.jsonl", 206)) == 4, "nothing comes ahead of the end"
        assert file.read(30_000) == data[20_000:50_000]
    empty = one(s3, f"{uri}-empty", b"")
    with empty.open() as file:
        assert file.read() == b""


@pytest.mark.parametrize("kind", ["reset-response", "cut", "status", "whole", "as-200"])
def test_a_fault_in_the_middle_is_overcome(s3: Proxy, uri: str, kind: str) -> None:
    source = one(s3, uri, data := lines(0, 400))
    s3.faults = [Fault(kind, match="x.jsonl", times=3, after=3000)]
    with source.open() as file:
        assert file.read() == data
    assert not any(fault.times for fault in s3.faults)
    if kind == "cut":
        starts = [int(span[6:].split("-")[0]) for _, _, span, _ in s3.requests("GET", "/x.jsonl", 206) if span]
        resumed = [start % 10_000 for start in starts if start % 10_000]
        assert len(resumed) == 3, "it goes on where the body broke"
        assert set(resumed) <= {3000, 6000, 9000}


def test_a_server_that_stays_away_is_no_mistake_of_the_user_s(s3: Proxy, uri: str, tmp_path: Path) -> None:
    put(s3, uri, "x.jsonl", lines(0, 400))
    dataset = find(uri, DatasetConfig())["x"]
    s3.faults = [Fault("reset-response", match="x.jsonl", times=10_000, after=0)]
    with pytest.raises(Unavailable, match=r"x.jsonl: the S3 server"):
        records(dataset.sources[0])
    with pytest.raises(Unavailable):
        run(load(IngestConfig, {}, data=uri, output_dir=str(tmp_path / "out")))
    s3.faults = []
    run(load(IngestConfig, {}, data=uri, output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize("change", ["edited", "shorter", "removed", "asked"])
@pytest.mark.parametrize("etags", [True, False])
def test_an_object_that_changes_while_it_is_read_is_an_error(s3: Proxy, uri: str, change: str, etags: bool) -> None:
    data = lines(0, 400)
    source = one(s3, uri, data)
    if etags:  # a file that was laid into the server's folder has none
        S3Store(uri).put_bytes("x.jsonl", data)
        source = objects_at(f"{uri}/x.jsonl", "data")[0][0]
    assert bool(source.etag.strip('"')) == etags
    path = s3.folder / "bucket" / uri.removeprefix("s3://bucket/") / "x.jsonl"
    with source.open() as file:
        file.read(100)
        if change == "removed":
            path.unlink()
        elif change == "asked":  # a server that obeys If-Match
            s3.faults = [Fault("status", match="x.jsonl", status=412)]
        else:
            other = data.replace(b"rain", b"RAIN") if change == "edited" else data[:15_000]
            path.write_bytes(other)
            os.utime(path, (1_700_000_000, 1_700_000_000))
            if etags:
                S3Store(uri).put_bytes("x.jsonl", other)
        with pytest.raises(UserError, match=r"x.jsonl was changed or removed while it was read: start again"):
            file.read()


def test_a_change_between_listing_and_reading_is_an_error_of_the_stage(s3: Proxy, uri: str, tmp_path: Path) -> None:
    path = put(s3, uri, "x.jsonl", lines(0, 400))

    def edit(method: str, target: str) -> None:
        if method == "GET" and target.endswith("x.jsonl") and path.stat().st_size != 7:
            path.write_bytes(b"changed")

    s3.before = edit
    with pytest.raises(UserError, match="changed or removed while it was read"):
        run(load(IngestConfig, {}, data=uri, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(s3: Proxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data=s3://.* does not exist"):
        find(uri, DatasetConfig())
    put(s3, uri, "notes.txt", b"x")
    with pytest.raises(UserError, match="holds no dataset"):
        find(uri, DatasetConfig())
    with pytest.raises(UserError, match=r"notes.txt is none of .jsonl"):
        find(f"{uri}/notes.txt", DatasetConfig())
    put(s3, uri, "a.jsonl", lines(0, 3))
    put(s3, uri, "a/b.jsonl", lines(0, 3))
    with pytest.raises(UserError, match="are both called a"):
        find(uri, DatasetConfig())
    put(s3, f"{uri}-2", "good/b.jsonl", lines(0, 3))
    put(s3, f"{uri}-2", "bad/notes.txt", lines(0, 3))
    with pytest.raises(UserError, match=r"bad holds no .jsonl"):
        find(f"{uri}-2", DatasetConfig())
    with pytest.raises(UserError, match=r"dataset 'other' is not in s3://.*; there are: bad, good"):
        s3_datasets(f"{uri}-2", "data", ["other"])
    put(s3, f"{uri}-2", "manifest.json", b"{}")
    with pytest.raises(UserError, match="is an output of Select-MoE"):
        find(f"{uri}-2", DatasetConfig())
    with pytest.raises(UserError, match=r"dataset.s3.data_dir=s3://bucket/prefix"):
        find("", DatasetConfig(dataset_from="s3"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the credentials"):
        find(uri, DatasetConfig())
    with pytest.raises(UserError, match="is not of the form s3://"):
        load(IngestConfig, {"dataset": {"s3": {"data_dir": "here"}}}, output_dir="x")
