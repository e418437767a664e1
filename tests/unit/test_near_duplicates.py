"""Near-duplicates of a dataset: pytest tests/unit/test_near_duplicates.py"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectmoe import near_duplicates
from selectmoe.config import load
from selectmoe.errors import Unavailable, UserError
from selectmoe.near_duplicates import (
    PERMUTATIONS,
    NearDuplicates,
    NearDuplicatesConfig,
    bands_of,
    sketch,
)
from selectmoe.ngrams import words
from selectmoe.pool import content_hash

WORDS = [f"w{n}" for n in range(2000)]


def row(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def text(seed: int, length: int = 80) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def jaccard(a: str, b: str, n: int) -> float:
    one, other = ({tuple(w[i : i + n]) for i in range(max(1, len(w) - n + 1))} for w in (words(a), words(b)))
    return len(one & other) / len(one | other)


def search(texts: dict[str, str], folder: Path, threshold: float = 0.8, ngram: int = 3) -> list[tuple[str, str, float]]:
    """(name, name of the row that stays, similarity) of the rows that go; numbers are those of the sorted names."""
    config = NearDuplicatesConfig(threshold, ngram)
    found, names = NearDuplicates(config, folder), sorted(texts)
    for name, content in texts.items():
        found.add(names.index(name), bytes.fromhex(content_hash(row(content))), sketch(row(content), config))
    return [(names[near.row], names[near.kept], near.similarity) for near in found.find()]


def earliest(texts: dict[str, str]) -> str:
    return min(texts, key=lambda name: (content_hash(row(texts[name])), name))


def test_of_rows_that_say_almost_the_same_the_first_by_content_stays(tmp_path: Path) -> None:
    base = text(0)
    like = {"a": base, "b": base.upper() + "!", "c": base.replace(" ", "  "), "d": f"{base} and more"}
    other = {f"x{n}": text(n) for n in range(1, 50)}
    found = search(like | other, tmp_path)
    stays = earliest(like)
    assert {name for name, _, _ in found} == set(like) - {stays}
    assert {kept for _, kept, _ in found} == {stays}
    assert all(similarity == pytest.approx(jaccard(like[name], like[stays], 3)) for name, _, similarity in found)
    assert not any(tmp_path.iterdir()), "scratch files are removed"


def test_exact_duplicates_are_near_duplicates_and_the_smallest_id_stays(tmp_path: Path) -> None:
    assert search({"b": text(0), "a": text(0), "c": text(0)}, tmp_path) == [
        ("b", "a", 1.0),
        ("c", "a", 1.0),
    ]


def test_rows_shorter_than_an_ngram_and_rows_without_a_word(tmp_path: Path) -> None:
    texts = {"a": "Yes.", "b": "yes", "c": "no", "d": "?!", "e": "?!", "f": "🙂"}
    found = search(texts, tmp_path)
    assert {frozenset((name, kept)) for name, kept, _ in found} == {frozenset("ab"), frozenset("de")}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.9]), st.integers(1, 4))
def test_what_goes_is_like_what_stays_and_what_stays_is_unlike(
    tmp_path: Path, seed: int, threshold: float, ngram: int
) -> None:
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    for n in range(40):
        chosen = text(rng.randrange(8), 30).split()
        for _ in range(rng.randrange(6)):
            chosen[rng.randrange(len(chosen))] = rng.choice(WORDS)
        texts[f"r{n:02d}"] = " ".join(chosen)
    found = search(texts, tmp_path, threshold, ngram)
    gone = {name for name, _, _ in found}
    for name, kept, similarity in found:
        assert kept not in gone
        assert similarity == pytest.approx(jaccard(texts[name], texts[kept], ngram))
        assert similarity >= threshold
    stay = sorted(set(texts) - gone)
    missed = [(a, b) for a in stay for b in stay if a < b and jaccard(texts[a], texts[b], ngram) >= threshold]
    assert len(missed) <= 1, "at the threshold one in 200 pairs may be missed"
    names = list(texts)
    rng.shuffle(names)
    assert search({name: texts[name] for name in names}, tmp_path, threshold, ngram) == found


def test_sketches_are_the_same_in_every_process() -> None:
    config = NearDuplicatesConfig(0.8)
    code = (
        "from selectmoe.near_duplicates import *; import sys; "
        "sys.stdout.buffer.write(sketch([{'role': 'user', 'content': 'one two three four five'}], NearDuplicatesConfig(0.8)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == sketch([{"role": "user", "content": "one two three four five"}], config)


def test_many_rows_of_one_template_are_compared_with_a_bounded_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "MOST", 3)
    template = text(0, 60)
    texts = {f"r{n:02d}": f"{template} {text(n, 25)}" for n in range(1, 30)}
    assert search(texts, tmp_path) == []
    assert len(search(texts | {"copy": texts["r07"]}, tmp_path)) <= 1


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "grams").symlink_to("/dev/full")
    with pytest.raises(Unavailable, match=r"cannot be written .No space left on device.: make room"):
        search({str(n): text(n) for n in range(100)}, tmp_path)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_few_pairs_at_the_threshold(threshold: float) -> None:
    bands, width = bands_of(threshold)
    assert bands * width <= PERMUTATIONS
    assert (1 - threshold**width) ** bands <= 0.005


@pytest.mark.parametrize(("key", "value"), [("threshold", 0.1), ("threshold", 1.5), ("ngram", 0), ("ngram", 51)])
def test_wrong_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"near_duplicates.{key}"):
        load(NearDuplicatesConfig, {key: value})
