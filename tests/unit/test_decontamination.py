"""Rows that share words with evaluation tasks: pytest tests/unit/test_decontamination.py"""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe.config import load
from selectmoe.decontamination import (
    SHORTEST,
    DecontaminateConfig,
    Document,
    Index,
    Overlap,
    task_documents,
)
from selectmoe.errors import UserError
from selectmoe.ngrams import row_words, words

WORDS = [f"w{n}" for n in range(3000)]


def text(seed: int, length: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def find(index: Index, messages: list[dict[str, str]]) -> Overlap | None:
    """Among other rows."""
    others = [row(text(7000, 20)), row(text(7001, 20))]
    found = index.find([others[0], messages, others[1]])
    assert set(found) <= {1}
    return found.get(1)


def row(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": t} for n, t in enumerate(texts)]


def test_thirteen_words_in_any_spelling_are_found_and_named() -> None:
    document = text(0, 40)
    index = Index([Document("other", "7", (text(1, 40),)), Document("mine", "3", (document,))], 13)
    shared = document.split()[20:33]
    found = find(index, row("Tell me:", f"{text(2, 30)} {', '.join(shared).upper()}! {text(3, 30)}"))
    assert found == Overlap("mine", "3", " ".join(shared))
    assert found.reason == f'shares "{" ".join(shared)}" with document 3 of task mine'
    assert find(index, row(f"{text(2, 30)} {' '.join(shared[:12])} {text(3, 30)}")) is None
    assert find(index, row(" ".join(shared[:6] + ["w0"] + shared[6:]))) is None


def test_words_on_both_sides_of_a_message_s_border_count() -> None:
    document = text(0, 20).split()
    index = Index([Document("mine", "0", (" ".join(document),))], 13)
    assert find(index, row(" ".join(document[:9]), " ".join(document[9:])))


def test_a_short_text_must_be_there_as_a_whole_and_a_shorter_one_is_not_looked_for() -> None:
    ten, seven = text(0, 10), text(1, SHORTEST - 1)
    index = Index([Document("mine", "0", (ten,)), Document("mine", "1", (seven,))], 13)
    assert find(index, row(f"so: {ten}?")) == Overlap("mine", "0", ten)
    assert find(index, row(ten.rsplit(" ", 1)[0])) is None
    assert find(index, row(f"so: {seven} and {text(2, 50)}")) is None
    assert index.summary() == {"documents": {"mine": 2}, "too_short": 1, "ngrams": 1, "common_ngrams": 0}


def test_the_wording_of_a_task_is_not_its_content() -> None:
    wording = "the following are questions with four answers each choose the right one of them now"
    documents = [Document("mine", str(n), (f"{wording} {text(n, 30)}",)) for n in range(20)]
    index = Index(documents, 13)
    assert find(index, row(f"{wording}: {text(99, 30)}")) is None
    assert find(index, row(text(5, 30))) == Overlap("mine", "5", " ".join(text(5, 30).split()[:13]))
    assert index.common > 0
    few = Index(documents[:10], 13)
    assert find(few, row(f"{wording}: {text(99, 30)}")), "ten documents may well share a passage"
    large = Index([*documents, *(Document("mine", f"x{n}", (text(1000 + n, 30),)) for n in range(400))], 13)
    assert find(large, row(f"{wording}: {text(99, 30)}")), "of 420 documents 20 are no more than 5 %"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9))
def test_exactly_the_rows_that_share_n_words_are_found(seed: int) -> None:
    rng = random.Random(seed)
    few = WORDS[:4]
    documents = [
        Document(f"t{n % 3}", str(n), (" ".join(rng.choices(few, k=rng.randint(1, 14))),))
        for n in range(rng.randint(0, 8))
    ]
    n = rng.randint(SHORTEST, 10)
    index = Index(documents, n)
    grams: dict[tuple[str, ...], str] = {}
    for document in documents:
        found = words(document.texts[0])
        length = min(n, len(found))
        if length >= SHORTEST:
            for i in range(len(found) - length + 1):
                grams.setdefault(tuple(found[i : i + length]), document.id)
    rows = [row(" ".join(rng.choices(few, k=rng.randint(0, 40)))) for _ in range(10)]
    overlaps = index.find(rows)
    for number, messages in enumerate(rows):
        own = row_words(messages)
        hits = {
            tuple(own[i : i + length]): None
            for length in range(n, SHORTEST - 1, -1)
            for i in range(len(own) - length + 1)
            if tuple(own[i : i + length]) in grams
        }
        overlap = overlaps.get(number)
        assert (overlap is not None) == bool(hits)
        if overlap:
            first = next(iter(hits))
            assert (overlap.words, overlap.document) == (" ".join(first), grams[first])
    assert pickle.loads(pickle.dumps(index)).identity == index.identity


def test_the_identity_is_that_of_the_documents() -> None:
    one = Document("a", "0", (text(0, 20),))
    assert Index([one], 13).identity == Index([one], 8).identity
    assert Index([one], 13).identity != Index([Document("a", "0", (text(1, 20),))], 13).identity
    assert Index([], 13).find([row(text(0, 20))]) == {}


def write_tasks(folder: Path) -> Path:
    """Three tasks of lm-eval: multiple choice, generation, and one whose choices are contexts."""
    folder.mkdir()
    head = "dataset_path: json\ndataset_kwargs:\n  data_files: {test: %s}\ntest_split: test\n"
    for name, records, rest in (
        (
            "choice",
            [{"q": text(n, 15), "options": [text(100 + n, 3), text(200 + n, 3)], "a": n % 2} for n in range(6)],
            "output_type: multiple_choice\ndoc_to_text: 'Question: {{q}}'\ndoc_to_target: a\ndoc_to_choice: options\n",
        ),
        (
            "free",
            [{"q": text(300 + n, 6), "a": text(400 + n, 9), "extra": text(500 + n, 20)} for n in range(6)],
            "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n",
        ),
        (
            "contexts",
            [{"starts": [text(600 + n, 6), text(700 + n, 6)], "end": text(800 + n, 8), "a": 0} for n in range(6)],
            "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: end\ndoc_to_choice: starts\n",
        ),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        metric = "acc" if "multiple" in rest else "exact_match"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{head % data}{rest}metric_list:\n  - metric: {metric}\n", encoding="utf-8"
        )
    (folder / "all.yaml").write_text("group: everything\ntask: [choice, free, contexts]\n")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("decontamination") / "tasks")


def test_documents_of_local_tasks_are_those_that_evaluate_uses(tasks: Path) -> None:
    documents = list(task_documents(["everything"], str(tasks)))
    assert [(d.task, d.id) for d in documents] == [
        (t, str(n)) for t in ("choice", "contexts", "free") for n in range(6)
    ]
    index = Index(documents, 13)
    for shared, task, number in (
        (text(3, 15), "choice", "3"),
        (f"{text(302, 6)} {text(402, 9)}", "free", "2"),
        (text(504, 20), "free", "4"),
        (f"{text(601, 6)} {text(801, 8)}", "contexts", "1"),
        (f"{text(701, 6)} {text(801, 8)}", "contexts", "1"),
    ):
        found = find(index, row("Hello", f"well, {shared}"))
        assert found
        assert (found.task, found.document) == (task, number)
    right = f"{text(1, 15)} {text(201, 3)}"
    assert " ".join(words(documents[1].texts[1])).endswith(right)
    assert find(index, row(text(5000, 300))) is None


def test_what_cannot_be_had_is_said_in_one_line(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nothing' is no task"):
        list(task_documents(["nothing"], str(tasks)))
    with pytest.raises(UserError, match="is no folder"):
        list(task_documents(["choice"], str(tmp_path / "none")))
    other = tmp_path / "tasks"
    other.mkdir()
    gone = (
        (tasks / "choice.yaml").read_text().replace("choice.jsonl", "gone.jsonl").replace("task: choice", "task: gone")
    )
    (other / "gone.yaml").write_text(gone)
    with pytest.raises(UserError, match=r"documents of gone cannot be had: [^\n]+$"):
        list(task_documents(["gone"], str(other)))


@pytest.mark.parametrize("settings", [{"ngram": 3}, {"ngram": 51}, {"include_path": "tasks"}])
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="decontaminate"):
        load(DecontaminateConfig, settings)
