"""Reading and converting what people have. Run: pytest tests/unit/test_formats.py"""

from __future__ import annotations

from typing import Any

import pytest

from selectmoe.errors import UserError
from selectmoe.formats import FormatError, format_of, own_dataset, own_id, schema, to_messages
from selectmoe.pool import Message

ROW = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind"}


def convert(record: Any, wanted: str = "") -> list[Message]:
    return to_messages(record, format_of(record, schema(wanted, "schema") if wanted else None))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, *ROW]}, [SYSTEM, *ROW]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ROW),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind"}, [SYSTEM, *ROW]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, ROW),
        ({"instruction": "Hi", "output": "Hello"}, ROW),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "x"}, ROW),
        ({"prompt": "Hi", "completion": "Hello"}, ROW),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(record: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert convert(record) == messages


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["no"], "JSON object, not list"),
        ({"text": "x"}, "no known format has the keys"),
        ({"messages": "x"}, "messages is not a list"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": ROW[:1]}, "no message of the assistant"),
        ({"messages": [ROW[0], {"role": "assistant", "content": " "}]}, "message 2 .assistant. is empty"),
        ({"messages": [ROW[0], {"role": "assistant", "content": None}]}, "content of message 2 is not a text"),
        ({"messages": [*ROW, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [*ROW, "x"]}, "message 3 is not an object"),
        ({"prompt": 1, "completion": "x"}, "prompt is not a text"),
    ],
)
def test_what_is_no_row_has_a_reason(record: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        convert(record)


def test_spec7_29_tool_turns_reject_the_row_and_are_never_dropped() -> None:
    for turn in ({"role": "tool", "content": "42"}, {"role": ["user"], "content": "x"}):
        with pytest.raises(FormatError, match="message 3 has the role"):
            convert({"messages": [*ROW, turn]})
    with pytest.raises(FormatError, match="message 2 calls a tool"):
        convert({"messages": [ROW[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]})
    with pytest.raises(FormatError, match="role 'function'"):
        convert({"conversations": [{"from": "function", "value": "x"}]})


def test_ids_are_the_sources_own_where_it_has_any() -> None:
    assert own_id({"id": "cot_1"}) == "cot_1"
    assert own_id({"id": 7}) == "7"
    assert own_id({"id": True}) == own_id({"id": None}) == own_id({}) == ""
    with pytest.raises(FormatError, match="control"):
        own_id({"id": "a\nb"})


def test_a_schema_wins_over_the_keys_that_are_found() -> None:
    both = {"prompt": "Hi", "completion": "Hello", "instruction": "No", "output": "no"}
    assert convert(both) == [{"role": "user", "content": "No"}, {"role": "assistant", "content": "no"}]
    assert convert(both, "prompt/completion") == ROW
    assert convert({"question": "Hi", "answer": "Hello"}, "question/answer") == ROW
    with pytest.raises(
        FormatError, match=r"has the keys \['answer'\]; the schema question/answer needs question, answer"
    ):
        convert({"answer": "Hello"}, "question/answer")
    with pytest.raises(
        UserError, match=r"schema=csv is unknown; known: messages, .* or two keys as in question/answer"
    ):
        schema("csv", "schema")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ROW, "system": "Be kind"},
        {"messages": [SYSTEM, *ROW], "system_prompt": "Be kind"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system_prompt": "Be kind"},
        {"instruction": "Hi", "output": "Hello", "system": "Be kind"},
    ],
)  # fmt: skip
def test_a_system_prompt_beside_the_messages_is_kept(record: dict[str, Any]) -> None:
    assert convert(record) == [SYSTEM, *ROW]


def test_nothing_that_was_said_is_left_out_in_silence() -> None:
    for record, reason in [
        ({"messages": [SYSTEM, *ROW], "system": "Be rude"}, "not the system prompt that the messages begin with"),
        ({"messages": ROW, "system": 7}, "system is not a text"),
        ({"instruction": "Sum", "input": 0, "output": "0"}, "input is not a text"),
        ({"instruction": "Sum", "input": ["1"], "output": "0"}, "input is not a text"),
    ]:
        with pytest.raises(FormatError, match=reason):
            convert(record)


def test_reasons_stay_short_and_their_kinds_few() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for record in (
        {"messages": [{"role": "x" * 10**6, "content": ""}]},
        {"messages": [{"role": deep, "content": ""}]},
        {"x" * 10**6: 1},
        {"messages": ROW, "id": "x" * 10**6},
        {"messages": [{"role": "user", "content": deep}]},
    ):
        with pytest.raises(FormatError) as error:
            own_id(record) if "id" in record else convert(record)
        assert len(str(error.value)) < 300
        assert len(error.value.kind) < 30
    for name in (deep, 7, None, "../x", "x" * 65, ".x", ""):
        with pytest.raises(FormatError, match="cannot be a dataset's name"):
            own_dataset({"dataset": name}, "a")
    assert own_dataset({"dataset": "b"}, "a") == "b"
    assert own_dataset({}, "a") == "a"
