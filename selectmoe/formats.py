"""Records in the formats that people have, converted into rows without loss, or refused with a reason.

No command runs this module; `ingest` converts through it. Known: messages, ShareGPT (`conversations`), Alpaca, Dolly,
prompt/completion; any other pair of keys can be named as `QUESTION/ANSWER`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selectmoe.errors import UserError
from selectmoe.pool import DATASET_NAME, ROLES, Message


class FormatError(Exception):
    """A record cannot become a row.

    Args:
        reason: why, for whoever has the record before him.
        kind: the same in a few words that do not vary, for counting.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Format:
    """A form that records have."""

    name: str
    keys: tuple[str, ...]
    """The keys that tell it."""
    convert: Callable[[Mapping[str, Any]], list[Message]]


OWN_ROLES = {role: role for role in ROLES}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{name} is not a text", "not a text")
    return value


def _from_messages(record: Mapping[str, Any]) -> list[Message]:
    turns = _turns(record["messages"], "messages")
    return _after_system(record, [_message(turn, n, "role", "content", OWN_ROLES) for n, turn in turns])


def _from_sharegpt(record: Mapping[str, Any]) -> list[Message]:
    turns = _turns(record["conversations"], "conversations")
    return _after_system(record, [_message(turn, n, "from", "value", SHAREGPT_ROLES) for n, turn in turns])


def _after_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, after the system prompt that stands beside them where there is one."""
    for key in ("system", "system_prompt"):
        if record.get(key) not in (None, ""):
            message = {"role": "system", "content": _text(record[key], key)}
            if not messages or messages[0]["role"] != "system":
                messages.insert(0, message)
            elif messages[0] != message:
                raise FormatError(f"{key} is not the system prompt that the messages begin with", "two system prompts")
    return messages


def _turns(value: Any, name: str) -> list[tuple[int, Any]]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is not a list", "no list of messages")
    return list(enumerate(value, 1))


def _message(turn: Any, number: int, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise FormatError(f"message {number} is not an object with {role_key} and {text_key}", "not a message")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise FormatError(f"message {number} has the role {_shown(role)}; known: {', '.join(roles)}", "unknown role")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise FormatError(f"message {number} calls a tool, which messages of text cannot hold", "call of a tool")
    return {"role": roles[role], "content": _text(turn[text_key], f"{text_key} of message {number}")}


def _instruct(prompt: str, extra: str | None, answer: str, record: Mapping[str, Any]) -> list[Message]:
    """One question, with what belongs to it after a blank line, and one answer."""
    question = _text(record[prompt], prompt)
    if extra and record.get(extra) not in (None, ""):
        addition = _text(record[extra], extra)
        question = f"{question}\n\n{addition}" if question else addition
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record[answer], answer)}]
    return _after_system(record, messages)


def _pair(question: str, extra: str | None, answer: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    return lambda record: _instruct(question, extra, answer, record)


FORMATS = {
    found.name: found
    for found in (
        Format("messages", ("messages",), _from_messages),
        Format("sharegpt", ("conversations",), _from_sharegpt),
        Format("alpaca", ("instruction", "output"), _pair("instruction", "input", "output")),
        Format("dolly", ("instruction", "response"), _pair("instruction", "context", "response")),
        Format("prompt/completion", ("prompt", "completion"), _pair("prompt", None, "completion")),
    )
}
"""By name; the first whose keys a record has is taken."""


def schema(name: str, key: str) -> Format:
    """The format that a user names: one of `FORMATS`, or the keys of question and answer as `QUESTION/ANSWER`.

    Args:
        name: what was given.
        key: the configuration key that it was given under, for messages.

    Raises:
        UserError: it is neither.
    """
    if found := FORMATS.get(name):
        return found
    question, slash, answer = name.partition("/")
    if not slash or not question or not answer:
        raise UserError(f"{key}={name} is unknown; known: {', '.join(FORMATS)}, or two keys as in question/answer")
    return Format(name, (question, answer), _pair(question, None, answer))


def format_of(record: Any, wanted: Format | None = None) -> Format:
    """The format of a record.

    Args:
        record: what was read.
        wanted: the format that it has to have; None: it is found by the record's keys.

    Raises:
        FormatError: it has none.
    """
    if not isinstance(record, Mapping):
        raise FormatError(f"a record is a JSON object, not {type(record).__name__}", "not an object")
    keys = record.keys()
    for found in FORMATS.values() if wanted is None else (wanted,):
        if all(key in keys for key in found.keys):
            return found
    has = f"has the keys {[key[:40] for key in sorted(map(str, keys))[:8]]}"
    if wanted:
        raise FormatError(f"it {has}; the schema {wanted.name} needs {', '.join(wanted.keys)}", "not of the schema")
    raise FormatError(f"no known format {has}; known: {', '.join(FORMATS)}", "no known format")


def to_messages(record: Mapping[str, Any], found: Format) -> list[Message]:
    """The messages of a record, texts unchanged.

    Raises:
        FormatError: a role has no place in a row (a tool's), a text is not a string or cannot be UTF-8, a question or an
            answer is empty, or there is no answer at all.
    """
    messages = found.convert(record)
    if not any(m["role"] == "assistant" for m in messages):
        raise FormatError("no message of the assistant", "no answer")
    for number, message in enumerate(messages, 1):
        content = message["content"]
        if not content or content.isspace():
            raise FormatError(f"message {number} ({message['role']}) is empty", "empty message")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            reason = f"message {number} holds half a surrogate pair, which is no text"
            raise FormatError(reason, "half a surrogate pair") from None
    return messages


def own_id(record: Mapping[str, Any]) -> str:
    """The id that the source gives a record (`id`: text or integer), else empty.

    Raises:
        FormatError: it cannot be kept: longer than 512 characters, or with characters that are no text.
    """
    value = record.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)
    if len(text) > 512 or not text.isprintable():
        raise FormatError("id is longer than 512 characters, or holds control characters", "unusable id")
    return text


def own_dataset(record: Mapping[str, Any], default: str) -> str:
    """The dataset that a row in a file of several says it is from.

    Raises:
        FormatError: what it says cannot be a dataset's name.
    """
    name = record.get("dataset", default)
    if not isinstance(name, str) or not DATASET_NAME.fullmatch(name):
        what = f"dataset {_shown(name)} cannot be a dataset's name (A-Z a-z 0-9 . _ -, at most 64)"
        raise FormatError(what, "unusable dataset")
    return name


def _shown(value: Any) -> str:
    """A value that may be anything, in a message."""
    return repr(value[:80]) if isinstance(value, str) else f"of type {type(value).__name__}"
