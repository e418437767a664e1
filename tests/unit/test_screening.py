"""Near-duplicates, decontamination and statistics through ingest: pytest tests/unit/test_screening.py"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_decontamination import text, write_tasks

from selectmoe import screening
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.ingest import IngestConfig, run, survey
from selectmoe.manifest import read_manifest
from selectmoe.pool import content_hash, locate, read_pool


def record(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def answer(seed: int) -> str:
    return text(10_000 + seed, 60)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def ingest(tmp_path: Path, data: Path, name: str = "out", **settings: Any) -> Path:
    return run(load(IngestConfig, settings, data=str(data), output_dir=str(tmp_path / name)))


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    """Every Parquet file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def near(n: int) -> list[dict[str, Any]]:
    """A row, one that differs in case, and one that has four more words."""
    return [
        record(f"Say {n}", answer(n)),
        record(f"SAY {n}!", answer(n).upper()),
        record(f"Say {n}", f"{answer(n)} and no more words"),
    ]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "SLICE", 7)


@pytest.mark.usefixtures("small_slices")
def test_near_duplicates_leave_the_pool_with_the_id_of_the_row_that_stays(tmp_path: Path) -> None:
    rows = [row for n in range(20) for row in near(n)] + [record(f"Say {n}", answer(n)) for n in range(20, 60)]
    random.Random(0).shuffle(rows)
    write(tmp_path / "in/a.jsonl", rows)
    write(tmp_path / "in/b.jsonl", near(0)[:1] + [record(f"Say {n}", answer(1000 + n)) for n in range(20)])
    given = {"near_duplicates": {"threshold": 0.8}, "holdout": 10}
    out = ingest(tmp_path, tmp_path / "in", **given)
    pool, holdout = read_pool(locate(out)), read_pool(locate(out, "holdout"))
    assert len(pool) + len(holdout) == 60 + 21, "a row of b is none of a's near-duplicates"
    assert read_manifest(out).rows["dropped"] == {screening.NEAR: 40}
    gone = rejected(out)
    assert len(gone) == 40
    by_id = {row.id: row for row in [*pool, *holdout]}
    for entry in gone:
        kept, similarity = entry["reason"].removeprefix("near-duplicate of ").split(" (similarity ")
        assert float(similarity.rstrip(")")) >= 0.8
        assert entry["dataset"] == "a"
        assert entry["id"] not in by_id
        said = entry["record"]["messages"][0]["content"].strip("!").split()[1]
        assert said == by_id[kept].messages[0]["content"].strip("!").split()[1]
        assert content_hash(by_id[kept].messages) < content_hash(entry["record"]["messages"])
    assert read_manifest(out / "pool/a").rows["dropped"][screening.NEAR] == 40
    found = survey(load(IngestConfig, given, data=str(tmp_path / "in"), output_dir="x"))
    assert found.rows - found.held == len(pool)


@pytest.mark.usefixtures("small_slices")
def test_neither_the_order_nor_the_workers_nor_another_dataset_change_a_byte(tmp_path: Path) -> None:
    rows = [row for n in range(30) for row in near(n)]
    tasks = write_tasks(tmp_path / "tasks")
    rows += [record("Tell me", f"{text(300 + n, 6)} {text(400 + n, 9)}") for n in range(4)]
    write(tmp_path / "one/a.jsonl", rows)
    write(tmp_path / "three/a.jsonl", rows)
    random.Random(1).shuffle(rows)
    write(tmp_path / "two/a/1.jsonl", rows[:20])
    write(tmp_path / "two/a/2.jsonl", rows[20:])
    write(tmp_path / "three/b.jsonl", [*rows[:30], *(record(f"Say {n}", answer(2000 + n)) for n in range(20))])
    given = {
        "near_duplicates": {"threshold": 0.7, "ngram": 2},
        "decontaminate": {"tasks": ["free"], "include_path": str(tasks)},
        "holdout": 0.1,
    }
    one = ingest(tmp_path, tmp_path / "one", "out-1", **given, workers=1)
    two = ingest(tmp_path, tmp_path / "two", "out-2", **given, workers=3)
    three = ingest(tmp_path, tmp_path / "three", "out-3", **given, workers=2)
    for place in ("pool/a", "holdout/a"):
        assert tree(one / place) == tree(two / place) == tree(three / place)
    assert tree(one / "pool/a")
    alone, beside = read_manifest(one / "pool/a"), read_manifest(three / "pool/a")
    assert alone.identity == beside.identity
    assert alone.rows == beside.rows
    first, second = (json.loads((o / "sources.json").read_text())["datasets"]["a"] for o in (one, two))
    assert first == second
    assert sorted(map(json.dumps, rejected(one))) == sorted(map(json.dumps, rejected(two)))


def test_rows_that_share_words_with_a_task_go_and_name_it(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    shared = f"{text(302, 6)} {text(402, 9)}"
    rows = [record(f"Say {n}", answer(n)) for n in range(30)] + [record("Well?", f"well: {shared}.")]
    data = write(tmp_path / "mine.jsonl", rows)
    given = {"decontaminate": {"tasks": ["everything"], "include_path": str(tasks)}, "holdout": 5}
    out = ingest(tmp_path, data, **given)
    assert read_manifest(out).rows["dropped"] == {screening.CONTAMINATED: 1}
    (entry,) = rejected(out)
    assert entry["reason"] == f'shares "{" ".join(shared.split()[:13])}" with document 2 of task free'
    summary = json.loads((out / "sources.json").read_text())["decontamination"]
    assert summary["documents"] == {"choice": 6, "contexts": 6, "free": 6}
    assert set(read_manifest(out).inputs) == {"data.mine", "decontaminate.tasks"}
    (tasks / "free.jsonl").write_text((tasks / "free.jsonl").read_text().replace("w1", "w2"))
    with pytest.raises(UserError, match=r"another run's output .input decontaminate.tasks"):
        ingest(tmp_path, data, **given)
    stale = given | {"decontaminate": given["decontaminate"] | {"include_digest": "0" * 64}}
    with pytest.raises(UserError, match="is no longer what `check` saw"):
        ingest(tmp_path, data, "stale", **stale)


def test_rows_that_share_words_with_the_holdout_go_when_that_is_wished(tmp_path: Path) -> None:
    rows = [record(f"Say {n}", answer(n)) for n in range(40)]
    rows += [
        record(f"Repeat {n}", f"so {' '.join(answer(n).split()[20:40])} it is {text(3000 + n, 40)}") for n in range(40)
    ]
    data = write(tmp_path / "mine.jsonl", rows)
    plain = ingest(tmp_path, data, "plain", holdout=10)
    out = ingest(tmp_path, data, holdout=10, decontaminate={"holdout": True})
    held = read_pool(locate(out, "holdout"))
    assert held == read_pool(locate(plain, "holdout"))
    pool, before = read_pool(locate(out)), read_pool(locate(plain))
    gone = rejected(out)
    assert gone
    assert len(pool) + len(gone) == len(before)
    ids = {row.id for row in held}
    for entry in gone:
        assert entry["reason"].split("document mine/")[1].split(" of task holdout")[0] in ids
    assert read_manifest(out).rows["dropped"] == {screening.NEAR_HOLDOUT: len(gone)}
    assert read_manifest(out / "pool/mine").identity != read_manifest(plain / "pool/mine").identity


def test_the_pool_s_numbers_are_in_sources_json_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    english = "What is the capital of France? The capital of France is Paris, a city on the river Seine. Number {}."
    rows = [record(f"Tell me about {n}", english.format(n)) for n in range(20)]
    out = ingest(tmp_path, write(tmp_path / "mine.jsonl", rows), holdout=5)
    found = json.loads((out / "sources.json").read_text())
    mine = found["datasets"]["mine"]
    pool = read_pool(locate(out))
    lengths = sorted(sum(len(m["content"]) for m in row.messages) for row in pool)
    assert mine["rows"] == len(pool) == 15
    assert (mine["characters"]["min"], mine["characters"]["max"]) == (lengths[0], lengths[-1])
    assert mine["characters"]["sum"] == mine["bytes"]["sum"] == sum(lengths)
    assert mine["languages"] == {"sampled": 15, "rows": {"en": 15}}
    assert "en 100%" in capsys.readouterr().err
    assert [entry["rows"] for entry in found["files"]] == [20]
    planted = ingest(tmp_path, tmp_path / "mine.jsonl", "planted", holdout=5, plant={"share": 0.5})
    assert json.loads((planted / "sources.json").read_text())["datasets"]["mine"]["rows"] == 30


def test_a_pool_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    rows = [record("Well?", f"{text(302, 6)} {text(402, 9)}")] * 3
    with pytest.raises(UserError, match=r"the pool is empty: 3 rows went: shares words with an evaluation task"):
        ingest(
            tmp_path,
            write(tmp_path / "mine.jsonl", rows),
            decontaminate={"tasks": ["free"], "include_path": str(tasks)},
            holdout=0,
        )
    assert not (tmp_path / "out").exists()
