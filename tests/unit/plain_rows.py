"""The rules of `ingest` written down plainly, one row after the other in memory: what the real one is compared with."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from selectmoe.pool import Message, Row

Given = tuple[str, str, list[Message]]
"""Dataset, own id, messages."""


def digest(messages: list[Message]) -> str:
    plain = [{"content": m["content"], "role": m["role"]} for m in messages]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def salted(messages: list[Message], salt: str) -> int:
    """The 64 bits by which a content is drawn, for a subset or the holdout."""
    return int(hashlib.sha256(f"{salt}{digest(messages)}".encode()).hexdigest()[:16], 16)


def with_ids(rows: Iterable[Given]) -> list[Row]:
    """A row's own id, else its content's; then `-2`, `-3` and so on, past those that are somebody's own."""
    wanted: defaultdict[tuple[str, str], list[tuple[str, list[Message]]]] = defaultdict(list)
    for dataset, own, messages in rows:
        wanted[dataset, own or f"{dataset}-{digest(messages)[:16]}"].append((digest(messages), messages))
    taken = set(wanted)
    out = []
    for (dataset, base), same in sorted(wanted.items()):
        first, *others = sorted(same, key=lambda pair: pair[0])
        out.append(Row(dataset, base, first[1]))
        k = 2
        for _, messages in others:
            while (dataset, f"{base}-{k}") in taken:
                k += 1
            taken.add((dataset, f"{base}-{k}"))
            out.append(Row(dataset, f"{base}-{k}", messages))
    return sorted(out, key=lambda row: row.key)


def divided(rows: list[Row], below: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Pool, holdout and the holdout's copies, of rows that have their ids."""
    pool, holdout, copies = [], [], []
    seen = set()
    for row in rows:
        if salted(row.messages, "holdout") >= below:
            pool.append(row)
        elif digest(row.messages) in seen:
            copies.append(row)
        else:
            holdout.append(row)
            seen.add(digest(row.messages))
    return pool, holdout, copies


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def row_of(record: Any) -> tuple[str, list[Message]] | None:
    """Own id and messages of a record; None: it cannot become a row."""
    if not isinstance(record, dict):
        return None
    turns = _turns(record)
    if turns is None:
        return None
    for key in ("system", "system_prompt"):
        if record.get(key) not in (None, ""):
            if not turns or turns[0][0] != "system":
                turns = [("system", record[key]), *turns]
            elif turns[0] != ("system", record[key]):
                return None
    if not all(isinstance(text, str) and text.strip() and _is_text(text) for _, text in turns):
        return None
    if "assistant" not in [role for role, _ in turns]:
        return None
    own = record.get("id")
    own = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else ""
    if len(own) > 512 or not own.isprintable():
        return None
    return own, [{"role": role, "content": text} for role, text in turns]


def _is_text(text: str) -> bool:
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def _turns(record: dict[str, Any]) -> list[tuple[str, Any]] | None:
    if "messages" in record or "conversations" in record:
        key, role, text = (
            ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
        )
        names = {"system", "user", "assistant"} if key == "messages" else set(ROLES)
        turns = record[key]
        if not isinstance(turns, list):
            return None
        for turn in turns:
            if not isinstance(turn, dict) or not {role, text} <= turn.keys():
                return None
            if not isinstance(turn[role], str) or turn[role] not in names:
                return None
            if turn.get("tool_calls") or turn.get("function_call"):
                return None
        return [(ROLES[turn[role]], turn[text]) for turn in turns]
    for question, extra, answer in (
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
        ("prompt", "", "completion"),
    ):
        if question in record and answer in record:
            asked, more = record[question], record.get(extra)
            if more not in (None, ""):
                if not isinstance(asked, str) or not isinstance(more, str):
                    return None
                asked = f"{asked}\n\n{more}" if asked else more
            return [("user", asked), ("assistant", record[answer])]
    return None
