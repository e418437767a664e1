"""Files of instruction rows in the formats that people have: every record with its place, converted or with a reason.

No command runs this module; `ingest` reads through it. Files: `.jsonl` (one record a line), `.json` (a list of records, or
lines), both also `.gz` and `.zst`; `.parquet`. Records: messages, ShareGPT (`conversations`), Alpaca, Dolly,
prompt/completion. Reading is strict: UTF-8, JSON without NaN, and a record that cannot be read or converted without loss
keeps its reason; it never takes its file with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from selectmoe.errors import UserError
from selectmoe.pool import ROLES, Message

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = (".jsonl", ".json", ".parquet")
MAX_LINE = 64 << 20
"""Bytes of one line; a longer one is rejected."""
MAX_RATIO = 200
"""Uncompressed over compressed bytes, above which a file is refused as a decompression bomb (looked at after 64 MiB)."""


class FormatError(Exception):
    """A record cannot become a row; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file: its place, and what it holds or why it cannot be read."""

    line: int
    """Line number, or number in the list or table, from 1."""
    value: Any
    """The parsed record; for one that cannot be read, its raw text."""
    error: str = ""
    """Why it cannot be read, or empty."""


def kind_of(path: Path) -> str:
    """`.jsonl`, `.json` or `.parquet`, seen through a compression's suffix; empty for any other file."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".json") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def stem_of(path: Path) -> str:
    """A file's name without the suffixes that say its kind and compression."""
    name = path.name
    for suffix in [*COMPRESSIONS, *KINDS]:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a file, in its order; blank lines are none.

    Raises:
        UserError: the file is of no known kind, is damaged, or not one record of it can be read.
    """
    kind = kind_of(path)
    if not kind:
        raise UserError(f"{path} is none of .jsonl, .json (either also .gz or .zst) and .parquet")
    readable = unreadable = 0
    first = ""
    try:
        records = _parquet(path) if kind == ".parquet" else _list_or_lines(path) if kind == ".json" else _lines(path)
        for record in records:
            readable, unreadable = (readable + (not record.error), unreadable + bool(record.error))
            first = first or record.error
            yield record
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if unreadable and not readable:
        raise UserError(f"{path} is not JSON: none of its {unreadable} lines can be read (the first: {first})")


def _open(path: Path) -> IO[bytes]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    if compression == "gzip":
        import gzip

        return gzip.open(path, "rb")  # type: ignore[return-value]
    import io

    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines without a bound on the file, with one on the line: of a longer one its first MAX_LINE + 1 bytes come."""
    packed = path.stat().st_size if path.suffix.lower() in COMPRESSIONS else 0
    seen = 0
    with _open(path) as file:
        while line := file.readline(MAX_LINE + 1):
            seen += len(line)
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE + 1)
                seen += len(rest)
            if packed and seen > MAX_LINE and seen > MAX_RATIO * packed:
                raise UserError(f"{path} unpacks to more than {MAX_RATIO} times its size: refused")
            yield line


def _lines(path: Path) -> Iterator[Record]:
    for number, raw in enumerate(_raw_lines(path), 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if len(raw) > MAX_LINE:
            yield Record(number, raw[:200].decode("utf-8", "replace"), f"line longer than {MAX_LINE >> 20} MiB")
        elif raw.strip():
            yield parse_line(number, raw)


def _list_or_lines(path: Path) -> Iterator[Record]:
    """A `.json` file: one list of records, or else one record a line, as many are written."""
    text = b"".join(_raw_lines(path)).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"[") and not parse_line(1, text.partition(b"\n")[0]).error:
        yield from _lines(path)
        return
    whole = parse_line(1, text)
    if not whole.error:
        values = whole.value if isinstance(whole.value, list) else [whole.value]
        yield from (Record(number, value) for number, value in enumerate(values, 1))
    elif text.startswith(b"["):
        raise UserError(f"{path} is not JSON: {whole.error}")
    else:
        yield from _lines(path)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number, {k: v for k, v in value.items() if v is not None})
    except pa.ArrowException as error:
        raise UserError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_line(number: int, raw: bytes) -> Record:
    """One record from the bytes of strict JSON; the reason in `error` where they are none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, raw.decode("utf-8", "replace").strip(), f"not UTF-8 (byte {error.start})")
    try:
        return Record(number, json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError) as error:
        return Record(number, text.strip(), f"not JSON ({error})")


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{name} is not a text")
    return value


def _from_messages(record: Mapping[str, Any]) -> list[Message]:
    return [
        _message(turn, n, "role", "content", {r: r for r in ROLES})
        for n, turn in _turns(record["messages"], "messages")
    ]


def _from_sharegpt(record: Mapping[str, Any]) -> list[Message]:
    turns = _turns(record["conversations"], "conversations")
    messages = [_message(turn, n, "from", "value", SHAREGPT_ROLES) for n, turn in turns]
    prompt = record.get("system") or record.get("system_prompt")
    if prompt and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(prompt, "system")})
    return messages


def _turns(value: Any, name: str) -> list[tuple[int, Any]]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is not a list")
    return list(enumerate(value, 1))


def _message(turn: Any, number: int, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise FormatError(f"message {number} is not an object with {role_key} and {text_key}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise FormatError(f"message {number} has the role {role!r}; known: {', '.join(roles)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise FormatError(f"message {number} calls a tool, which messages of text cannot hold")
    return {"role": roles[role], "content": _text(turn[text_key], f"{text_key} of message {number}")}


def _instruct(prompt: str, extra: Any, answer: str, record: Mapping[str, Any]) -> list[Message]:
    """One question, with what belongs to it after a blank line, and one answer."""
    question = _text(record[prompt], prompt)
    addition = record.get(extra) if extra else None
    if addition:
        question = f"{question}\n\n{_text(addition, extra)}" if question else _text(addition, extra)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record[answer], answer)}]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": _text(record["system"], "system")})
    return messages


FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], list[Message]]]] = {
    "messages": (frozenset({"messages"}), _from_messages),
    "sharegpt": (frozenset({"conversations"}), _from_sharegpt),
    "alpaca": (frozenset({"instruction", "output"}), lambda r: _instruct("instruction", "input", "output", r)),
    "dolly": (frozenset({"instruction", "response"}), lambda r: _instruct("instruction", "context", "response", r)),
    "prompt/completion": (frozenset({"prompt", "completion"}), lambda r: _instruct("prompt", None, "completion", r)),
}
"""Name -> (the keys that tell it, converter); the first that fits a record is taken."""


def to_messages(record: Any) -> list[Message]:
    """The messages of a record in any of `FORMATS`, texts unchanged.

    Raises:
        FormatError: no format fits, a role has no place in a row (a tool's), a text is not a string or cannot be UTF-8,
            a question or an answer is empty, or there is no answer at all.
    """
    if not isinstance(record, Mapping):
        raise FormatError(f"a record is a JSON object, not {type(record).__name__}")
    for keys, convert in FORMATS.values():
        if keys <= record.keys():
            messages = convert(record)
            break
    else:
        raise FormatError(f"no known format has the keys {sorted(map(str, record))[:8]}; known: {', '.join(FORMATS)}")
    if not any(m["role"] == "assistant" for m in messages):
        raise FormatError("no message of the assistant")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            raise FormatError(f"message {number} ({message['role']}) is empty")
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"message {number} holds half a surrogate pair, which is no text") from None
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
        raise FormatError("id is longer than 512 characters, or holds control characters")
    return text
