"""Reading and converting what people have. Run: pytest tests/unit/test_formats.py"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe import formats
from selectmoe.errors import UserError
from selectmoe.formats import FormatError, kind_of, own_id, read_records, stem_of, to_messages

ROW = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, *ROW]}, [SYSTEM, *ROW]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ROW),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind"}, [SYSTEM, *ROW]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, ROW),
        ({"instruction": "Hi", "output": "Hello"}, ROW),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "x"}, ROW),
        ({"prompt": "Hi", "completion": "Hello"}, ROW),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(record: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert to_messages(record) == messages


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["no"], "JSON object, not list"),
        ({"text": "x"}, "no known format has the keys"),
        ({"messages": "x"}, "messages is not a list"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": ROW[:1]}, "no message of the assistant"),
        ({"messages": [ROW[0], {"role": "assistant", "content": " "}]}, "message 2 .assistant. is empty"),
        ({"messages": [ROW[0], {"role": "assistant", "content": None}]}, "content of message 2 is not a text"),
        ({"messages": [*ROW, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [*ROW, "x"]}, "message 3 is not an object"),
        ({"prompt": 1, "completion": "x"}, "prompt is not a text"),
    ],
)
def test_what_is_no_row_has_a_reason(record: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        to_messages(record)


def test_spec7_29_tool_turns_reject_the_row_and_are_never_dropped() -> None:
    for turn in ({"role": "tool", "content": "42"}, {"role": ["user"], "content": "x"}):
        with pytest.raises(FormatError, match="message 3 has the role"):
            to_messages({"messages": [*ROW, turn]})
    with pytest.raises(FormatError, match="message 2 calls a tool"):
        to_messages({"messages": [ROW[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]})
    with pytest.raises(FormatError, match="role 'function'"):
        to_messages({"conversations": [{"from": "function", "value": "x"}]})


def test_ids_are_the_sources_own_where_it_has_any() -> None:
    assert own_id({"id": "cot_1"}) == "cot_1"
    assert own_id({"id": 7}) == "7"
    assert own_id({"id": True}) == own_id({"id": None}) == own_id({}) == ""
    with pytest.raises(FormatError, match="control"):
        own_id({"id": "a\nb"})


def lines(path: Path) -> list[tuple[int, Any, str]]:
    return [(r.line, r.value, r.error) for r in read_records(path)]


def test_spec7_28_one_bad_line_never_loses_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": NaN}\n\xff\xfe\n{"a": "\xc3\xa9"}\r\n{"a": 3}')
    found = lines(path)
    assert [(n, v) for n, v, error in found if not error] == [(1, {"a": 1}), (6, {"a": "é"}), (7, {"a": 3})]
    assert [(n, error.split(" (")[0]) for n, _, error in found if error] == [
        (3, "not JSON"),
        (4, "not JSON"),
        (5, "not UTF-8"),
    ]


def test_a_file_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("hello\nworld\n")
    with pytest.raises(UserError, match=r"a\.jsonl is not JSON: none of its 2 lines"):
        lines(path)
    for name in ("b.json", "c.json"):
        (tmp_path / name).write_text("[{}, " if name == "b.json" else "<html>")
        with pytest.raises(UserError, match="is not JSON"):
            lines(tmp_path / name)


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '[\n {"a": 1},\n {"a": 2}\n]\n', '{"a": 1}\n{"a": 2}\n'])
def test_json_files_hold_a_list_or_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert lines(tmp_path / "a.json") == [(1, {"a": 1}, ""), (2, {"a": 2}, "")]


def test_compressed_files_and_parquet(tmp_path: Path) -> None:
    text = "".join(json.dumps({"a": i}) + "\n" for i in range(3))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(text.encode())
    pq.write_table(pa.Table.from_pylist([{"a": i, "b": None} for i in range(3)]), tmp_path / "a.parquet")
    wanted = [(i + 1, {"a": i}, "") for i in range(3)]
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert lines(tmp_path / name) == wanted
        assert stem_of(tmp_path / name) == "a"
    assert kind_of(Path("x.csv")) == kind_of(Path("x.gz")) == kind_of(Path("x.parquet.gz")) == ""


def test_damaged_files_are_the_users_mistake(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"not packed")
    (tmp_path / "c.jsonl.zst").write_bytes(b"not packed")
    (tmp_path / "d.parquet").write_bytes(b"not a table")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        with pytest.raises(UserError, match=name):
            lines(tmp_path / name)


def test_long_lines_and_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "x" * 350}) + '\n{"a": 1}\n')
    found = lines(tmp_path / "a.jsonl")
    assert found[0][2].startswith("line longer than")
    assert found[1:] == [(2, {"a": 1}, "")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000))
    with pytest.raises(UserError, match="more than 200 times"):
        lines(tmp_path / "b.jsonl.gz")
