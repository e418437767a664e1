"""Corrupted copies. Run: pytest tests/unit/test_corruption.py"""

from __future__ import annotations

import random

import pytest

from selectmoe.corruption import CORRUPTIONS, corrupt
from selectmoe.errors import UserError
from selectmoe.pool import Row, content_id

QUESTION = {"role": "user", "content": "What is rain?"}


def row(*answers: str) -> Row:
    messages = [m for a in answers for m in (dict(QUESTION), {"role": "assistant", "content": a})]
    return Row("cot", "own-id", messages)


RAIN = row("Water that falls from clouds in drops.", "It wets the ground and fills the rivers.")
DONOR = row("Tea is made with leaves.")


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_changes_the_answers_and_nothing_else(kind: str) -> None:
    before = [dict(m) for m in RAIN.messages]
    copy = corrupt(kind, RAIN, DONOR, random.Random(1))
    assert copy is not None
    assert RAIN.messages == before, "the row itself is untouched"
    assert copy.answers != RAIN.answers
    assert len(copy.answers) == 2
    assert all(answer.strip() for answer in copy.answers)
    assert [m for m in copy.messages if m["role"] == "user"] == [QUESTION, QUESTION]
    assert copy.dataset == "cot"
    assert copy.id == content_id("cot", copy.messages)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_same_chance_gives_the_same_copy(kind: str) -> None:
    assert corrupt(kind, RAIN, DONOR, random.Random(7)) == corrupt(kind, RAIN, DONOR, random.Random(7))


def spoiled(kind: str, seed: int, of: Row = RAIN) -> list[str]:
    copy = corrupt(kind, of, DONOR, random.Random(seed))
    assert copy is not None
    return copy.answers


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_keeps_the_words_and_not_their_order(seed: int) -> None:
    answers = spoiled("shuffled", seed)
    assert [sorted(answer.split()) for answer in answers] == [sorted(answer.split()) for answer in RAIN.answers]
    assert answers != RAIN.answers


@pytest.mark.parametrize("seed", range(3))
def test_swapped_takes_the_donors_answers_in_turn(seed: int) -> None:
    assert spoiled("swapped", seed) == DONOR.answers * 2
    two = corrupt("swapped", row("one"), RAIN, random.Random(seed))
    assert two is not None
    assert two.answers == RAIN.answers[:1], "no more answers than the row has questions"


@pytest.mark.parametrize("seed", range(20))
def test_truncated_keeps_a_fifth_to_three_fifths_of_the_beginning(seed: int) -> None:
    for cut, full in zip(spoiled("truncated", seed), RAIN.answers, strict=True):
        assert full.startswith(cut)
        assert 0.2 * len(full) - 2 <= len(cut) <= 0.6 * len(full)


@pytest.mark.parametrize("seed", range(20))
def test_repeated_says_a_few_words_of_the_answer_over_and_over(seed: int) -> None:
    for loop, full in zip(spoiled("repeated", seed), RAIN.answers, strict=True):
        words = loop.split()
        width = len(set(words))
        assert 1 <= width <= 3
        assert " ".join(words[:width]) in full
        assert all(word == words[i % width] for i, word in enumerate(words))
        assert len(words) == max(6, len(full.split()))


@pytest.mark.parametrize("seed", range(20))
def test_random_chars_replaces_about_half_and_no_blank(seed: int) -> None:
    for noisy, full in zip(spoiled("random_chars", seed), RAIN.answers, strict=True):
        assert [c.isspace() for c in noisy] == [c.isspace() for c in full]
        kept = sum(a == b for a, b in zip(noisy, full, strict=True) if not b.isspace())
        assert 0.15 < kept / len(full.replace(" ", "")) < 0.85


def test_a_row_that_a_kind_cannot_spoil_gives_none() -> None:
    rng = random.Random(0)
    assert corrupt("shuffled", row("Yes"), DONOR, rng) is None
    assert corrupt("shuffled", row("no no no"), DONOR, rng) is None
    assert corrupt("swapped", RAIN, RAIN, rng) is None
    assert corrupt("truncated", row("x"), DONOR, rng) is None


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'typos'; known: shuffled, swapped, truncated, repeated, random_chars"):
        corrupt("typos", RAIN, DONOR, random.Random(0))
