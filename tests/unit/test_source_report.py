"""What the sources were found to hold. Run: pytest tests/unit/test_source_report.py"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.config import load
from selectmoe.ingest import IngestConfig, run

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def ingest(tmp_path: Path, **settings: Any) -> list[dict[str, Any]]:
    config = {"holdout": 0, "max_rejected": 1, **settings}
    out = run(load(IngestConfig, config, data=str(tmp_path / "in"), output_dir=str(tmp_path / "out")))
    found: list[dict[str, Any]] = json.loads((out / "sources.json").read_text())["files"]
    return found


def test_every_file_says_what_it_held_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "cot").mkdir(parents=True)
    (tmp_path / "in" / "cot" / "sub").mkdir()
    mixed = [
        {"messages": MESSAGES},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": " "},
        {"text": 1},
        {"id": "a\nb", "messages": MESSAGES},
    ]
    lines = [*map(json.dumps, mixed), "{broken", ""]
    (tmp_path / "in/cot/a.jsonl").write_text("\n".join(lines))
    packed = gzip.compress(json.dumps(mixed[:2]).encode())
    (tmp_path / "in/cot/sub/b.json.gz").write_bytes(packed)
    pq.write_table(pa.table({"q": ["Hi", "Ho"], "a": ["Hello", None]}), tmp_path / "in/flan.parquet")
    found = ingest(tmp_path, dataset={"schemas": {"flan": "q/a"}})
    shown = capsys.readouterr().err
    assert [(f["dataset"], f["file"], f["kind"], f["compression"]) for f in found] == [
        ("cot", "a.jsonl", ".jsonl", ""),
        ("cot", "sub/b.json.gz", ".json", "gzip"),
        ("flan", "flan.parquet", ".parquet", ""),
    ]
    a, b, flan = found
    assert (a["records"], a["rows"], b["records"], b["rows"], flan["records"], flan["rows"]) == (6, 2, 2, 2, 2, 1)
    assert a["formats"] == {
        "messages": {"records": 2, "keys": ["messages"]},
        "alpaca": {"records": 2, "keys": ["instruction", "output"]},
    }
    assert a["rejected"] == {"empty message": 1, "no known format": 1, "not JSON": 1, "unusable id": 1}
    assert b["bytes"] == len(packed)
    assert flan["formats"] == {"q/a": {"records": 1, "keys": ["q", "a"]}}
    assert flan["schema"] == "q/a"
    assert flan["rejected"] == {"not of the schema": 1}
    line = next(line for line in shown.splitlines() if line.startswith("cot/a.jsonl"))
    assert "alpaca (instruction, output: 2)" in line
    assert "messages (messages: 2)" in line
    assert "4 (1 " in line
    assert any(
        line.startswith("flan/flan.parquet") and line.endswith("q/a (q, a); asked for") for line in shown.splitlines()
    )


def test_many_files_are_added_up_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    for n in range(50):
        (tmp_path / "in" / "x" / f"{n:02d}.jsonl").write_text(json.dumps({"prompt": str(n), "completion": "b"}) + "\n")
    assert len(ingest(tmp_path)) == 50
    shown = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("x/") for line in shown) == 40
    (rest,) = (line for line in shown if line.startswith("and 10 more"))
    assert rest.split()[4:6] == ["10", "10"]
