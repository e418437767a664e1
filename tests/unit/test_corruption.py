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


def test_each_kind_does_what_its_name_says() -> None:
    rng = random.Random(0)
    made = {kind: corrupt(kind, RAIN, DONOR, rng) for kind in CORRUPTIONS}
    answers = {kind: copy.answers for kind, copy in made.items() if copy}
    assert sorted(answers["shuffled"][0].split()) == sorted(RAIN.answers[0].split())
    assert answers["swapped"] == DONOR.answers * 2
    assert all(full.startswith(cut) for cut, full in zip(answers["truncated"], RAIN.answers, strict=True))
    assert len(set(answers["repeated"][0].split())) <= 3
    assert len(answers["random_chars"][0]) == len(RAIN.answers[0])


def test_a_row_that_a_kind_cannot_spoil_gives_none() -> None:
    rng = random.Random(0)
    assert corrupt("shuffled", row("Yes"), DONOR, rng) is None
    assert corrupt("shuffled", row("no no no"), DONOR, rng) is None
    assert corrupt("swapped", RAIN, RAIN, rng) is None
    assert corrupt("truncated", row("x"), DONOR, rng) is None


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'typos'; known: shuffled, swapped, truncated, repeated, random_chars"):
        corrupt("typos", RAIN, DONOR, random.Random(0))
