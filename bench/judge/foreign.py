"""A sixth kind of corruption, for the study only: answers in another language (its text comes from an installed package).

No command runs this module; importing it registers the kind in this process. The product's training knows the kinds of
`selectmoe.corruption` alone, so this one also stands for bad rows that nobody thought of.
"""

from __future__ import annotations

import functools
import random

from selectmoe.corruption import CORRUPTIONS
from selectmoe.demo import package
from selectmoe.pool import Row, content_id

NAME = "other_language"
LANGUAGES = ("german", "italian", "spanish")


@functools.cache
def replies(language: str) -> tuple[str, ...]:
    """The replies of chatterbot-corpus in a language, each once."""
    import yaml

    found: dict[str, None] = {}
    for path in sorted((package("chatterbot_corpus") / "data" / language).glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            found |= {str(turn).strip(): None for turn in turns[1:2] if len(str(turn).strip()) > 10}
    return tuple(found)


def other_language(row: Row, donor: Row, rng: random.Random) -> Row | None:
    """Replies to something else, in another language, in the place of every answer and cut to its length (20 characters at least)."""
    texts = replies(rng.choice(LANGUAGES))
    messages = []
    for message in row.messages:
        content = message["content"]
        if message["role"] == "assistant":
            wanted, content = max(20, len(content)), rng.choice(texts)
            while len(content) < wanted:
                content += " " + rng.choice(texts)
            content = content[:wanted].rstrip()
        messages.append({"role": message["role"], "content": content})
    return Row(row.dataset, content_id(row.dataset, messages), messages)


CORRUPTIONS.setdefault(NAME, other_language)
