"""Rows between reading and writing. Run: pytest tests/unit/test_spool.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe import spool
from selectmoe.manifest import canonical_json
from selectmoe.pool import Message, content_hash, text_bytes

MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(st.characters(exclude_categories=["Cs"]))})
)  # fmt: skip


@given(MESSAGES)
def test_the_canonical_messages_are_the_manifests_canonical_json(messages: list[Message]) -> None:
    assert spool.canonical(messages) == canonical_json(messages)
    assert spool.canonical([{"role": m["role"], "content": m["content"]} for m in messages]) == canonical_json(messages)


def one(content: str) -> list[Message]:
    return [{"role": "user", "content": "é?"}, {"role": "assistant", "content": content}]


def test_rows_come_back_with_their_sizes_and_hashes(tmp_path: Path) -> None:
    given = [one(text) for text in ("a", "\0\u202e\U0001f600", "b" * 1000)]
    out = spool.Spool(tmp_path, 3)
    place = out.place()
    for messages in given:
        out.add(place, "x", messages, "ü", b"")
    out.flush()
    rows, ids = spool.rows_at(tmp_path, place)
    texts = spool.Texts(tmp_path)
    assert texts.messages([3, 3, 3], rows) == given
    assert texts.messages([3, 3], rows[[2, 0]]) == [given[2], given[0]]
    assert ids.decode() == "üüü"
    assert rows["text"].tolist() == [text_bytes(m) for m in given]
    assert rows["answers"].tolist() == [text_bytes(m[1:]) for m in given]
    assert [row.tobytes()[:16].hex() for row in rows] == [content_hash(m)[:32] for m in given]
    for changed in (b"A", b""):
        data = bytearray((tmp_path / "3.rows").read_bytes())
        data[-20:] = changed
        (tmp_path / "3.rows").write_bytes(data)
        with pytest.raises(RuntimeError, match=r"is not what was read|holds no"):
            texts.messages([3], rows[2:])
    (tmp_path / "3.index").write_bytes((tmp_path / "3.index").read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="rows were lost"):
        spool.rows_at(tmp_path, place)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "raw", "kept"),
    [
        ({"b": 1, "a": "\ud800"}, b"...", {"a": "\ud800", "b": 1}),
        ({"a": float("nan")}, b"", "{'a': nan}"),
        ({1: 2, "a": 3}, b"", "{1: 2, 'a': 3}"),
        (deep(5000), b"[[\xff", "[[\ufffd"),
        (np.float32(1), b"", "1.0"),
        (b"\xff", b"", "b'\\xff'"),
    ],
)
def test_whatever_is_rejected_is_kept(tmp_path: Path, value: Any, raw: bytes, kept: Any) -> None:
    out = spool.Spool(tmp_path, 0)
    out.reject(1, 7, 'no "text"\ud800', value, raw)
    out.flush()
    found = spool.rejects(tmp_path)
    assert found.entries["line"].tolist() == [7]
    reason, text = spool.Texts(tmp_path).rejected(0, found.entries[0])
    assert reason == 'no "text"\ud800'
    assert json.loads("{" + text) == {"reason": reason, "record": kept}


def test_rejected_records_are_ordered_by_piece_and_line(tmp_path: Path) -> None:
    files = [spool.Spool(tmp_path, worker) for worker in (0, 10)]
    for n, (piece, line) in enumerate([(2, 1), (0, 5), (1, 1), (0, 2)]):
        files[n % 2].reject(piece, line, "r", n, b"")
    for out in files:
        out.close()
    found = spool.rejects(tmp_path)
    assert list(zip(found.entries["piece"].tolist(), found.entries["line"].tolist(), strict=True)) == [
        (0, 2),
        (0, 5),
        (1, 1),
        (2, 1),
    ]
    assert found.worker.tolist() == [10, 10, 0, 0]
    assert len(found) == 4
