"""Datasets of the hub, streamed: pytest tests/unit/test_sources_hf.py   (a stand-in speaks the hub's protocol)

The libraries read the hub's address when they are imported, so every case runs in a process of its own.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_hub import DatasetHub

from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.ingest import IngestConfig
from selectmoe.manifest import read_manifest
from selectmoe.pool import locate, read_pool
from selectmoe.sources_hf import HubStream

COMMIT, OTHER = DatasetHub.COMMIT, "f" * 40


def record(n: int) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"Say {n}"},
            {"from": "gpt", "value": f"{n} it is, said again: {n}"},
        ]
    }


def lines(first: int, last: int) -> str:
    return "".join(json.dumps(record(n)) + "\n" for n in range(first, last))


@pytest.fixture
def hub(tmp_path: Path):  # type: ignore[no-untyped-def]
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "extra").mkdir()
    (folder / "data/train-00000-of-00002.jsonl").write_text(lines(0, 30))
    (folder / "data/train-00001-of-00002.jsonl.gz").write_bytes(gzip.compress(lines(30, 50).encode()))
    (folder / "data/test.jsonl").write_text(lines(50, 60))
    (folder / "extra/train.jsonl").write_text(lines(60, 80))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n"
        "  - {split: test, path: data/test.jsonl}\n- config_name: extra\n  data_files: extra/*.jsonl\n---\n"
    )
    server = DatasetHub(folder)
    yield server
    server.close()


def select(
    hub: DatasetHub, tmp_path: Path, *words: str, out: str = "out", **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "selectmoe.cli", "ingest", *words, f"output_dir={tmp_path / out}"]
    return subprocess.run(command, capture_output=True, text=True, env=kept | settings, timeout=120)


def contents(out: Path) -> set[int]:
    rows = read_pool(locate(out)) + read_pool(locate(out, "holdout"))
    return {int(row.messages[0]["content"].split()[1]) for row in rows}


def test_a_dataset_of_the_hub_is_streamed_and_its_commit_recorded(hub: DatasetHub, tmp_path: Path) -> None:
    done = select(hub, tmp_path, "data=hf://maker/rows", "holdout=5")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == set(range(50))
    found = read_manifest(tmp_path / "out")
    assert found.inputs["data.rows"]["uri"] == f"hf://maker/rows@{COMMIT}"
    assert {row.dataset for row in read_pool(locate(tmp_path / "out"))} == {"rows"}
    assert not [name for name in (tmp_path / "home").rglob("*") if "train-0000" in name.name], "nothing is downloaded"
    assert all(f"resolve/{COMMIT}/" in path for _, path, _ in hub.seen if "resolve" in path)
    pinned = select(hub, tmp_path, f"data=hf://maker/rows@{COMMIT}", "holdout=5", out="pinned")
    assert pinned.returncode == 0, pinned.stderr
    assert read_manifest(tmp_path / "pinned").identity == found.identity
    again = select(hub, tmp_path, "data=hf://maker/rows", "holdout=5")
    assert again.returncode == 0, again.stderr
    hub.branch = OTHER
    moved = select(hub, tmp_path, "data=hf://maker/rows", "holdout=5")
    assert moved.returncode == 2
    assert "holds another run's output (input data.rows" in moved.stderr


def test_configurations_and_splits_are_datasets_of_their_own(hub: DatasetHub, tmp_path: Path) -> None:
    entries = "[{path:maker/rows,split:test,name:tests},{path:maker/rows,config:extra,name:more,revision:main}]"
    done = select(hub, tmp_path, "dataset.dataset_from=hf", f"dataset.hf.datasets={entries}", "holdout=5")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == set(range(50, 80))
    inputs = read_manifest(tmp_path / "out").inputs
    assert set(inputs) == {"data.tests", "data.more"}
    assert inputs["data.tests"]["identity"] != inputs["data.more"]["identity"]


def test_parquet_is_read_in_ranges(hub: DatasetHub, tmp_path: Path) -> None:
    for path in [*hub.folder.rglob("*.jsonl*"), hub.folder / "README.md"]:
        path.unlink()
    (hub.folder / "extra").rmdir()  # the hub knows no empty folders
    table = pa.Table.from_pylist([record(n) | {"source": None} for n in range(500)])
    pq.write_table(table, hub.folder / "data/train.parquet", row_group_size=100)
    done = select(hub, tmp_path, "data=hf://maker/rows", "holdout=5")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == set(range(500))


@pytest.mark.parametrize(
    ("words", "state", "code", "message"),
    [
        (["data=hf://maker/other"], {}, 2, "hf://maker/other: the hub has no dataset maker/other, or it is private"),
        (["data=hf://maker/rows@v9"], {}, 2, "hf://maker/rows@v9: the hub's dataset maker/rows has no revision v9"),
        (["data=hf://rows"], {}, 2, "data=hf://rows is not of the form hf://OWNER/NAME[@REVISION]"),
        (["data=hf://maker/rows"], {"gated": True}, 2, "is gated: accept its terms on the hub and set HF_TOKEN"),
        (["dataset.dataset_from=hf", "dataset.hf.datasets=[{path:maker/rows,split:nope}]"], {}, 2, "split"),
        (["dataset.dataset_from=hf", "dataset.hf.datasets=[{path:maker/rows,config:nope}]"], {}, 2, "'nope' not found"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(
    hub: DatasetHub, tmp_path: Path, words: list[str], state: dict[str, bool], code: int, message: str
) -> None:
    vars(hub).update(state)
    done = select(hub, tmp_path, *words)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_switched_off_or_away(hub: DatasetHub, tmp_path: Path) -> None:
    off = select(hub, tmp_path, "data=hf://maker/rows", HF_HUB_OFFLINE="1")
    assert off.returncode == 2
    assert off.stderr.strip().endswith("the hub is switched off (HF_HUB_OFFLINE): unset it, or name local files")
    away = select(hub, tmp_path, "data=hf://maker/rows", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 1
    assert "hf://maker/rows: the hub does not answer" in away.stderr
    assert "Traceback" not in away.stderr


def test_a_file_that_the_library_cannot_read_is_named(hub: DatasetHub, tmp_path: Path) -> None:
    (hub.folder / "data/train-00000-of-00002.jsonl").write_text(lines(0, 30) + "{broken\n")
    done = select(hub, tmp_path, "data=hf://maker/rows")
    assert done.returncode == 2, done.stderr
    assert f"hf://maker/rows@{COMMIT} cannot be read as a dataset: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "is empty"),
        ([{"path": "rows"}], "must have a path of the form OWNER/NAME"),
        ([{"path": "maker/rows", "splits": "train"}], "unknown key splits; known: path, name"),
        ([{"path": "maker/rows", "name": "../x"}], "the name '../x' must be"),
        ([{"path": "maker/rows"}, {"path": "other/rows"}], "two are called rows"),
    ],
)
def test_wrong_entries_are_named_before_the_hub_is_asked(entries: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(IngestConfig, {"dataset": {"dataset_from": "hf", "hf": {"datasets": entries}}}, output_dir="x")


def test_the_default_is_the_predecessor_s_dataset() -> None:
    config = load(IngestConfig, {"dataset": {"dataset_from": "hf"}}, output_dir="x")
    assert config.dataset.hf.datasets == [{"path": "teknium/OpenHermes-2.5", "name": "openhermes", "split": "train"}]


def test_streams_cross_processes() -> None:
    stream = HubStream("maker/rows", "", "train", COMMIT, 3, 12)
    assert pickle.loads(pickle.dumps(stream)) == stream
    assert (stream.place, stream.uri) == ("train-00003-of-00012", f"hf://maker/rows@{COMMIT}")
