"""Reading what people have. Run: pytest tests/unit/test_records.py"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe import records
from selectmoe.errors import UserError
from selectmoe.records import Reading, pieces_of
from selectmoe.sources import kind_of, local_file, stem_of


def lines(path: Path) -> list[tuple[int, Any, str]]:
    """(line, value, error) of every record, over the pieces of a file."""
    found, before = [], 0
    for piece in pieces_of(local_file(path)):
        reading = Reading(piece)
        found += [(before + r.line, r.value, r.error) for r in reading]
        before += reading.lines
    return found


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


def test_a_list_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    for text, message in {"[{}, ": "does not end", '[{"a": 1}] x': "something follows", '["a': "does not end"}.items():
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=f"b.json is not JSON: .*{message}"):
            lines(tmp_path / "b.json")


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
    monkeypatch.setattr(records, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "x" * 350}) + '\n{"a": 1}\n')
    found = lines(tmp_path / "a.jsonl")
    assert found[0][2].startswith("line longer than")
    assert found[1:] == [(2, {"a": 1}, "")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000))
    with pytest.raises(UserError, match="more than 200 times"):
        lines(tmp_path / "b.jsonl.gz")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
LINES = st.lists(st.one_of(JSON.map(json.dumps), st.sampled_from(["", " ", "{", "x" * 70, '"\\ud800"']))).map("\n".join)


@given(LINES, st.integers(1, 40), st.booleans())
def test_a_file_in_ranges_holds_what_it_holds_as_a_whole(text: str, piece: int, ends: bool) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.jsonl")
        path.write_text(text + "\n" * ends, encoding="utf-8")
        for most in (40, records.MAX_LINE):
            patch.setattr(records, "MAX_LINE", most)
            patch.setattr(records, "PIECE", 1 << 20)
            whole = lines(path)
            patch.setattr(records, "PIECE", piece)
            assert lines(path) == whole
    raw = (text + "\n" * ends).split("\n")
    wanted = [(n, r) for n, r in enumerate(raw, 1) if r.strip()]
    assert [n for n, _, _ in whole] == [n for n, _ in wanted]
    for (_, value, error), (_, line) in zip(whole, wanted, strict=True):
        assert value == (line.strip() if error else json.loads(line))


@given(st.lists(JSON), st.sampled_from([None, 0, 2]), st.integers(1, 30), st.booleans())
def test_a_list_holds_its_elements(values: list[Any], indent: int | None, block: int, plain: bool) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.json")
        path.write_text(" \n" + json.dumps(values, indent=indent, ensure_ascii=plain) + "\n", "utf-8", "surrogatepass")
        patch.setattr(records, "BLOCK", block)
        assert [(n, v) for n, v, error in lines(path) if not error] == [*enumerate(values, 1)]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_long_element_of_a_list_is_rejected_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    long = {"a": ['\\"],{' * 50], "b": "\\" * 201}
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, long, {"a": 2}, "x" * 98, "x" * 97]))
    monkeypatch.setattr(records, "MAX_LINE", 100)
    monkeypatch.setattr(records, "BLOCK", block)
    found = lines(tmp_path / "a.json")
    assert [(n, error.split(" than")[0]) for n, _, error in found if error] == [(2, "line longer"), (4, "line longer")]
    assert [value for _, value, error in found if not error] == [{"a": 1}, {"a": 2}, "x" * 97]


def test_elements_that_are_not_json_are_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a" 2}, , {"a": 3}}, "\xff", NaN, {"a": 4},]')
    found = lines(tmp_path / "a.json")
    assert [(n, v) for n, v, error in found if not error] == [(1, {"a": 1}), (7, {"a": 4})]
    assert [(n, error.split(" (")[0]) for n, _, error in found if error] == [
        (2, "not JSON"), (3, "not JSON"), (4, "not JSON"), (5, "not UTF-8"), (6, "not JSON"), (8, "not JSON"),
    ]  # fmt: skip


def test_a_json_file_may_hold_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n{\n "a": 1\n}')
    assert lines(tmp_path / "a.json") == [(1, {"a": 1}, "")]
    for text in ("", " \n", "[]", "[ ]\n"):
        (tmp_path / "a.json").write_text(text)
        assert lines(tmp_path / "a.json") == []


def damaged(data: bytes) -> dict[str, bytes]:
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return {"half": data[: len(data) // 2], "almost": data[:-3], "more": data + b"garbage", "flipped": bytes(flipped)}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_no_damage_of_a_packed_file_goes_unseen(tmp_path: Path, suffix: str) -> None:
    text = "".join(json.dumps({"a": n, "b": str(hash(n * 7919) % 997)}) + "\n" for n in range(5000)).encode()
    data = gzip.compress(text) if suffix == ".gz" else pa.compress(text, codec="zstd", asbytes=True)
    path = tmp_path / f"a.jsonl{suffix}"
    for whole in (data, data + data):
        path.write_bytes(whole)
        assert len(lines(path)) == 5000 * len(whole) // len(data), "several members are one file"
    for what, bad in damaged(data).items():
        path.write_bytes(bad)
        if what == "flipped" and suffix == ".zst":
            continue  # a frame carries a checksum only where its writer wanted one
        with pytest.raises(UserError, match=r"a\.jsonl.* cannot be read"):
            lines(path)


def test_tables_are_read_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": n, "b": "x" * (n % 50), "c": None if n % 3 else [{"d": "é"}]} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet", row_group_size=90)
    wanted = [(n, {k: v for k, v in value.items() if v is not None}, "") for n, value in enumerate(values, 1)]
    assert len(pieces_of(local_file(tmp_path / "a.parquet"))) == 1
    assert lines(tmp_path / "a.parquet") == wanted
    monkeypatch.setattr(records, "PIECE", 3000)
    monkeypatch.setattr(records, "BATCH_BYTES", 300)
    assert len(pieces_of(local_file(tmp_path / "a.parquet"))) > 3
    assert lines(tmp_path / "a.parquet") == wanted


def test_a_text_of_a_table_that_is_not_utf8_is_rejected_alone(tmp_path: Path) -> None:
    ends, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"ok\xff\xfez")
    texts = pa.Array.from_buffers(pa.string(), 3, [None, ends, data])
    inner = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([texts], ["c"]))
    for number, column in enumerate((texts, inner)):
        pq.write_table(pa.table({"a": column, "n": [1, 2, 3]}), tmp_path / f"{number}.parquet")
        first, bad, last = lines(tmp_path / f"{number}.parquet")
        assert (first[1]["n"], last[1]["n"], last[0]) == (1, 3, 3)
        assert bad[0] == 2
        assert bad[2].startswith("not UTF-8")
        assert r"\xff\xfe" in bad[1]
    pq.write_table(pa.Table.from_arrays([texts.slice(0, 1), texts.slice(0, 1)], ["a", "a"]), tmp_path / "2.parquet")
    with pytest.raises(UserError, match="two columns called a"):
        lines(tmp_path / "2.parquet")


def test_a_string_of_ten_megabytes_and_nesting_without_end(tmp_path: Path) -> None:
    long = '\0\u202e\U0001f600"\\' * 1_500_000
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": long}) + "\n" + deep + '\n{"a": 1}\n')
    first, bad, last = lines(tmp_path / "a.jsonl")
    assert first == (1, {"a": long}, "")
    assert bad[2].startswith("not JSON (maximum recursion")
    assert bad[1] == deep
    assert last == (3, {"a": 1}, "")
    (tmp_path / "a.json").write_text(f"[{json.dumps({'a': long})}, {deep}, 1]")
    first, bad, last = lines(tmp_path / "a.json")
    assert first == (1, {"a": long}, "")
    assert bad[1] == deep
    assert last == (3, 1, "")
