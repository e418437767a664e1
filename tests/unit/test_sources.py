"""Datasets on this machine. Run: pytest tests/unit/test_sources.py"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from selectmoe.errors import UserError
from selectmoe.manifest import tree_identity
from selectmoe.sources import LocalFile, Source, Stream, compression_of, kind_of, local_datasets, local_file, stem_of


@pytest.mark.parametrize(
    ("name", "kind", "compression", "stem"),
    [
        ("a.jsonl", ".jsonl", "", "a"),
        ("a.JSON", ".json", "", "a"),
        ("a.b.jsonl.gz", ".jsonl", "gzip", "a.b"),
        ("a.json.ZST", ".json", "zstd", "a"),
        ("a.parquet", ".parquet", "", "a"),
        ("a.parquet.gz", "", "gzip", "a"),
        ("a.csv", "", "", "a.csv"),
        ("jsonl", "", "", "jsonl"),
    ],
)
def test_a_file_s_name_says_what_it_is(name: str, kind: str, compression: str, stem: str) -> None:
    assert (kind_of(Path(name)), compression_of(Path(name)), stem_of(Path(name))) == (kind, compression, stem)


def test_a_folder_of_folders_and_files(tmp_path: Path) -> None:
    for name in (
        "cot/b.jsonl",
        "cot/sub/a.json",
        "cot/.hidden/x.jsonl",
        "cot/notes.txt",
        "flan.jsonl.gz",
        ".old/x.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"a": name}) + "\n")
    found = local_datasets(tmp_path, "data")
    assert {name: [s.place for s in data.sources] for name, data in found.items()} == {
        "cot": ["b.jsonl", "sub/a.json"],
        "flan": ["flan.jsonl.gz"],
    }
    assert [data.several for data in found.values()] == [False, True]
    assert found["cot"].entry() == {"uri": str(tmp_path / "cot"), "identity": tree_identity(tmp_path / "cot")}
    assert list(local_datasets(tmp_path, "data", ["flan", "flan"])) == ["flan"]
    assert list(local_datasets(tmp_path / "flan.jsonl.gz", "data")) == ["flan"]


def test_a_file_crosses_processes_and_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    source: LocalFile = pickle.loads(pickle.dumps(local_file(path)))
    assert isinstance(source, Source)
    assert not isinstance(source, Stream)
    assert (source.uri, source.place, source.size) == (str(path), "a.jsonl", 3)
    with source.open() as one, source.open() as two:
        assert one.read() == two.read() == b"{}\n"
    source.check()
    path.write_text("{ }\n")
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was read"):
        source.check()
