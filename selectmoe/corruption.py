"""Ways to spoil a row's answers, question untouched: what a judge of quality must rank low.

No command runs this module. `ingest` plants such copies into a pool (``plant.share=0.35``), so that a report can say
how well a judge finds what is known to be bad; `warmup` makes them on the fly for its contrastive loss. Every kind
acts on the answers of the assistant, and gives None for a row that it would not change.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from selectmoe.errors import UserError
from selectmoe.pool import Row, content_id

Corruption = Callable[[Row, Row, random.Random], Row | None]
"""(row, another row of the pool, source of chance) -> the corrupted copy, or None where there is nothing to spoil."""

ALPHABET = string.ascii_letters + string.digits + string.punctuation
NOISE = 0.5
"""Share of an answer's characters that `random_chars` replaces."""


def _with_answers(row: Row, answers: list[str]) -> Row | None:
    """The row with other answers (in their order), under the id of its new content; None where nothing changed."""
    if answers == row.answers or not any(answer.strip() for answer in answers):
        return None
    fresh = iter(answers)
    messages = [
        {"role": m["role"], "content": next(fresh)} if m["role"] == "assistant" else dict(m) for m in row.messages
    ]
    return Row(row.dataset, content_id(row.dataset, messages), messages)


def shuffled(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """The words of every answer in another order."""
    answers = []
    for answer in row.answers:
        words = answer.split()
        rng.shuffle(words)
        answers.append(" ".join(words) if len(words) > 1 else answer)
    changed = any(a.split() != b.split() for a, b in zip(answers, row.answers, strict=True))
    return _with_answers(row, answers) if changed else None


def swapped(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """The answers of another row: good text that answers something else."""
    theirs = donor.answers
    if not theirs or set(theirs) & set(row.answers):
        return None
    return _with_answers(row, [theirs[i % len(theirs)] for i in range(len(row.answers))])


def truncated(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """Every answer cut off after 20 to 60 % of its characters, at least one left."""
    return _with_answers(row, [a[: max(1, int(len(a) * rng.uniform(0.2, 0.6)))].rstrip() for a in row.answers])


def repeated(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """One to three words of every answer, over and over, to the answer's length in words (at least six)."""
    answers = []
    for answer in row.answers:
        words = answer.split()
        if not words:
            return None
        width = rng.randint(1, min(3, len(words)))
        start = rng.randint(0, len(words) - width)
        loop = words[start : start + width]
        answers.append(" ".join(loop[i % width] for i in range(max(6, len(words)))))
    return _with_answers(row, answers)


def random_chars(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """Half of the characters of every answer replaced by random ones, blanks kept."""

    def noisy(text: str) -> str:
        return "".join(rng.choice(ALPHABET) if not c.isspace() and rng.random() < NOISE else c for c in text)

    return _with_answers(row, [noisy(answer) for answer in row.answers])


CORRUPTIONS: dict[str, Corruption] = {
    "shuffled": shuffled,
    "swapped": swapped,
    "truncated": truncated,
    "repeated": repeated,
    "random_chars": random_chars,
}
"""Every kind by its name."""


def check_kinds(kinds: list[str], key: str) -> None:
    """Refuse names that are no kinds of corruption.

    Args:
        kinds: the names given.
        key: the configuration key that they were given under, for the message.

    Raises:
        UserError: the list is empty or holds an unknown name.
    """
    unknown = [kind for kind in kinds if kind not in CORRUPTIONS]
    if unknown or not kinds:
        what = f"holds the unknown kind {unknown[0]!r}" if unknown else "is empty"
        raise UserError(f"{key} {what}; known: {', '.join(CORRUPTIONS)}")


def corrupt(kind: str, row: Row, donor: Row, rng: random.Random) -> Row | None:
    """A corrupted copy of a row.

    Args:
        kind: a name in `CORRUPTIONS`.
        row: the row; it is not changed.
        donor: another row, whose answers `swapped` takes.
        rng: source of chance.

    Returns:
        A new row in the same dataset under the id of its content, or None where this kind would not change the row.

    Raises:
        UserError: the kind is unknown.
    """
    check_kinds([kind], "corruption")
    return CORRUPTIONS[kind](row, donor, rng)
