"""Numbers of a dataset: pytest tests/unit/test_pool_statistics.py"""

from __future__ import annotations

import json
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe import pool_statistics
from selectmoe.pool import content_hash
from selectmoe.pool_statistics import Statistics, language, table

TEXTS = {
    "en": "How do I reverse a list in Python without using the built-in function? Use slicing with a negative step.",
    "de": "Wie kann ich in Python eine Liste umkehren, ohne die eingebaute Funktion zu benutzen? Mit einem Slice.",
    "fr": "Comment puis-je inverser une liste en Python sans utiliser la fonction intégrée ? Avec une tranche.",
    "zh": "如何在不使用内置函数的情况下反转列表?可以使用切片,步长为负一,这样就会得到反转的列表。",
    "ja": "組み込み関数を使わずにリストを逆順にするにはどうすればよいですか?スライスを使います。",
    "ru": "Как перевернуть список без использования встроенной функции? Используйте срез с отрицательным шагом.",
    "ar": "كيف يمكنني عكس قائمة دون استخدام الدالة المدمجة؟ استخدم التقطيع بخطوة سالبة.",
    "hi": "मैं बिल्ट-इन फ़ंक्शन का उपयोग किए बिना सूची को कैसे उलट सकता हूँ? स्लाइसिंग का उपयोग करें।",
}


def row(text: str, turns: int = 2) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}] + [{"role": "assistant", "content": "é"}] * (turns - 1)


def gather(rows: list[list[dict[str, str]]]) -> Statistics:
    found = Statistics()
    for messages in rows:
        found.add(bytes.fromhex(content_hash(messages)), messages)
    return found


def test_lengths_are_exact() -> None:
    found = gather([row("a" * n, 2 + n % 3) for n in range(100)]).result()
    assert found["rows"] == 100
    assert found["characters"]["min"] == 1
    assert found["characters"]["max"] == max(n + 1 + n % 3 for n in range(100))
    assert found["bytes"]["sum"] == sum(n + 2 * (1 + n % 3) for n in range(100))
    turns = [2 + n % 3 for n in range(100)]
    assert found["turns"]["mean"] == round(statistics.mean(turns), 1)
    assert found["turns"]["p5"] == sorted(turns)[4]
    assert found["turns"]["median"] == statistics.median_low(turns)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(0, 60), st.randoms())
def test_neither_order_nor_parts_change_a_number(sizes: list[int], cut: int, rng: random.Random) -> None:
    rows = [row("x" * size) for size in sizes]
    whole = gather(rows).result()
    rng.shuffle(rows)
    parts = gather(rows[:cut])
    parts.merge(gather(rows[cut:]))
    assert parts.result() == whole
    assert whole["characters"]["median"] == statistics.median_low(size + 1 for size in sizes)
    json.dumps(whole, allow_nan=False)


def test_the_sample_are_the_rows_with_the_smallest_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_statistics, "SAMPLE", 10)
    seen: list[str] = []

    def told(text: str) -> str:
        seen.append(text)
        return "en"

    monkeypatch.setattr(pool_statistics, "language", told)
    rows = [row(f"number {n}") for n in range(200)]
    found = gather(rows).result()
    smallest = sorted(rows, key=content_hash)[:10]
    assert sorted(seen) == sorted(f"{r[0]['content']}\né" for r in smallest)
    assert found["languages"] == {"sampled": 10, "rows": {"en": 10}}


def test_languages() -> None:
    assert {code: language(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    assert language("3 + 4 = 7") == "und"
    found = gather([row(text) for text in TEXTS.values()] + [row(TEXTS["en"] + " Why?")]).result()
    assert found["languages"]["rows"]["en"] == 2
    assert next(iter(found["languages"]["rows"])) == "en"


def test_an_empty_dataset_has_numbers_too() -> None:
    found = Statistics().result()
    assert found["rows"] == 0
    assert "none" in table({"none": found})


def test_the_table_has_a_line_per_dataset() -> None:
    text = table({"b": gather([row("x" * n) for n in range(10)]).result(), "a": gather([row(TEXTS["de"])]).result()})
    head, a, b = text.splitlines()
    assert head.split()[:2] == ["dataset", "rows"]
    assert a.split()[:2] == ["a", "1"]
    assert a.endswith("de 100%")
    assert b.split()[:5] == ["b", "10", "5", "10", "10"]
