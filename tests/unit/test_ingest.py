"""From people's files to pool and holdout. Run: pytest tests/unit/test_ingest.py"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.ingest import IngestConfig, run
from selectmoe.manifest import read_manifest
from selectmoe.pool import Row, content_hash, content_id, locate, read_pool

WORDS = "rain cloud river stone tree light wind sand grass snow leaf root bird fish hill road".split()  # noqa: SIM905


def record(n: int, **more: Any) -> dict[str, Any]:
    words = " ".join(random.Random(n).choices(WORDS, k=8))
    return {
        "messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n} {words}"}],
        **more,
    }


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def ingest(tmp_path: Path, data: Path | str, name: str = "out", **settings: Any) -> Path:
    return run(load(IngestConfig, settings, data=str(data), output_dir=str(tmp_path / name)))


def jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_of_datasets_becomes_pool_and_holdout(tmp_path: Path) -> None:
    write(tmp_path / "in/cot/a.jsonl", [record(n) for n in range(30)])
    write(tmp_path / "in/cot/sub/b.jsonl", [record(n) for n in range(30, 60)])
    write(tmp_path / "in/dolly.jsonl", [record(n) for n in range(60, 100)])
    write(tmp_path / "in/cot/.backup/a.jsonl", [record(n) for n in range(30)])
    out = ingest(tmp_path, tmp_path / "in")
    pool, holdout = read_pool(locate(out)), read_pool(locate(out, "holdout"))
    assert (len(pool), len(holdout)) == (80, 20)
    assert Counter(r.dataset for r in pool + holdout) == {"cot": 60, "dolly": 40}
    manifest = read_manifest(out)
    assert manifest.rows == {"in": 100, "out": 100, "dropped": {}}
    assert read_manifest(out / "pool").rows["out"] == 80
    assert read_manifest(out / "holdout").rows["out"] == 20
    assert not (out / "planted.jsonl").exists()


def test_spec7_26_ids_are_exact_and_never_positions(tmp_path: Path) -> None:
    records = [record(n) for n in range(40)] + [record(n, id=f"own_{n}") for n in range(40, 50)]
    first = read_pool(locate(ingest(tmp_path, write(tmp_path / "x.jsonl", records), "a", holdout=0)))
    random.Random(0).shuffle(records)
    other = ingest(tmp_path, write(tmp_path / "y" / "x.jsonl", records[:30] + ["", *records[30:]]), "b", holdout=0)
    assert read_pool(locate(other)) == first
    assert (other / "pool/x/00000.parquet").read_bytes() == (tmp_path / "a/pool/x/00000.parquet").read_bytes()
    for row in first:
        number = int(row.messages[0]["content"].split()[1])
        assert row.messages == record(number)["messages"]
        assert row.id == (f"own_{number}" if number >= 40 else content_id("x", row.messages))


def test_spec7_27_rows_with_one_id_are_all_kept(tmp_path: Path) -> None:
    a, b = record(1)["messages"], record(2)["messages"]
    given = [("x", "7", b), ("x", "7", a), ("x", "7-2", a), ("x", "", a), ("x", "", a), ("y", "7", a)]
    lines = [{"dataset": d, "messages": m} | ({"id": i} if i else {}) for d, i, m in given]
    rows = read_pool(locate(ingest(tmp_path, write(tmp_path / "x.jsonl", lines), holdout=0)))
    low, high = sorted([a, b], key=content_hash)
    made = {row.key: row.messages for row in rows}
    assert len(made) == len(rows) == 6
    assert made["x", "7"] == low
    assert made["x", "7-3"] == high, "7-2 was another row's own"
    assert made["x", content_id("x", a)] == made["x", content_id("x", a) + "-2"] == a
    again = ingest(tmp_path, write(tmp_path / "2" / "x.jsonl", lines[::-1]), "again", holdout=0)
    assert read_pool(locate(again)) == rows


def test_exact_duplicates_of_the_holdout_leave_the_pool_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", [record(n) for n in range(20)] * 2)
    write(tmp_path / "in/b.jsonl", [record(n) for n in range(20)])
    out = ingest(tmp_path, tmp_path / "in", holdout=5)
    pool, holdout = read_pool(locate(out)), read_pool(locate(out, "holdout"))
    assert len(holdout) == len({content_hash(r.messages) for r in holdout}) == 5
    assert not {content_hash(r.messages) for r in pool} & {content_hash(r.messages) for r in holdout}
    assert len(pool) == 45
    assert read_manifest(out).rows["dropped"] == {"exact duplicate of a row of the holdout": 10}
    assert len(jsonl(out / "rejected.jsonl")) == 10


def test_spec7_28_bad_rows_are_kept_with_place_and_reason(tmp_path: Path) -> None:
    good = [record(n) for n in range(300)]
    path = write(tmp_path / "x.jsonl", [*good[:9], "{broken", *good[9:], {"messages": []}])
    out = ingest(tmp_path, path)
    assert read_manifest(out).rows["dropped"] == {"not convertible into messages": 1, "not readable as JSON": 1}
    broken, empty = jsonl(out / "rejected.jsonl")
    assert (broken["file"], broken["line"], broken["record"]) == ("x.jsonl", 10, "{broken")
    assert (empty["line"], empty["reason"]) == (302, "no message of the assistant")


def test_spec7_28_too_many_bad_rows_are_an_error_with_the_first_ten(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [record(n) for n in range(80)] + [{"text": n} for n in range(12)])
    with pytest.raises(UserError, match=r"12 of 92 rows cannot be used .max_rejected=0.01 allows 0.") as error:
        ingest(tmp_path, path)
    assert str(error.value).count("no known format") == 10
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists(), "nothing is left behind"
    ingest(tmp_path, path, max_rejected=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": {"local": {"dataset_names": ["cot", "flan"]}}},
            "dataset 'flan' is not in .*; there are: cot, empty",
        ),
        ({"dataset": {"local": {"dataset_names": ["empty"]}}}, "holds no .jsonl"),
        ({"dataset": {"dataset_from": "hub"}}, "dataset_from=hub is unknown"),
        ({"holdout": -1}, "holdout"),
        ({"holdout": 2.5}, "holdout"),
        ({"max_rejected": 2}, "max_rejected"),
        ({"plant": {"share": 1}}, "plant.share"),
        ({"plant": {"kinds": ["typos"]}}, "unknown kind 'typos'; known: shuffled"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path / "in/cot/a.jsonl", [record(n) for n in range(10)])
    (tmp_path / "in/empty").mkdir()
    with pytest.raises(UserError, match=message):
        ingest(tmp_path, tmp_path / "in", **settings)


def test_inputs_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    cases = {
        tmp_path / "missing.jsonl": "does not exist",
        write(tmp_path / "a.csv", ["x"]): "is none of",
        write(tmp_path / "b.jsonl", ["x", "y"]): "is not JSON",
        write(tmp_path / "c.jsonl", []): "the pool is empty",
        tmp_path / "none": "holds no dataset",
        write(tmp_path / "bad/a b/x.jsonl", [record(1)]).parent.parent: "dataset name 'a b'",
        write(tmp_path / "two/x.jsonl", [record(1)]).parent: "both called x",
    }
    write(tmp_path / "two/x.json", [record(1)])
    for data, message in cases.items():
        with pytest.raises(UserError, match=message):
            ingest(tmp_path, data)
    out = ingest(tmp_path, write(tmp_path / "x.jsonl", [record(n) for n in range(9)]))
    with pytest.raises(UserError, match="output of Select-MoE already"):
        ingest(tmp_path, out, "again")
    with pytest.raises(UserError, match=r"dataset.local.data_dir=dataset/train/processed does not exist"):
        ingest(tmp_path, "")


def test_a_file_of_several_datasets_keeps_them_apart(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", [record(n, dataset="cot" if n % 2 else "flan") for n in range(10)] + [record(10)]
    )
    pool = read_pool(locate(ingest(tmp_path, path, holdout=0)))
    assert Counter(r.dataset for r in pool) == {"cot": 5, "flan": 5, "x": 1}
    with pytest.raises(UserError, match="cannot be a dataset's name"):
        ingest(tmp_path, write(tmp_path / "y.jsonl", [record(1, dataset="../x")]), "b")


def planted(tmp_path: Path, name: str, **plant: Any) -> tuple[list[Row], list[Row], dict[tuple[str, str], str]]:
    path = write(tmp_path / "x.jsonl", [record(n, id=f"own_{n}") for n in range(200)])
    out = ingest(tmp_path, path, name, plant=plant)
    kinds = {(p["dataset"], p["id"]): p["kind"] for p in jsonl(out / "planted.jsonl")}
    return read_pool(locate(out)), read_pool(locate(out, "holdout")), kinds


def test_planting_gives_the_share_and_leaves_the_holdout_clean(tmp_path: Path) -> None:
    pool, holdout, kinds = planted(tmp_path, "a", share=0.35)
    originals = {content_hash(record(n)["messages"]) for n in range(200)}
    assert all(content_hash(r.messages) in originals for r in holdout)
    assert len(holdout) == 40
    assert len(pool) == 160 + len(kinds)
    assert len(kinds) == round(160 * 0.35 / 0.65)
    assert {r.key for r in pool if content_hash(r.messages) not in originals} == set(kinds)
    counts = Counter(kinds.values())
    assert set(counts) == {"shuffled", "swapped", "truncated", "repeated", "random_chars"}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_nothing_in_the_pool_gives_planted_rows_away(tmp_path: Path) -> None:
    pool, holdout, kinds = planted(tmp_path, "a", share=0.35)
    assert all(r.id == content_id("x", r.messages) for r in pool + holdout)
    ranks = [n / len(pool) for n, row in enumerate(pool) if row.key in kinds]
    assert 0.4 < sum(ranks) / len(ranks) < 0.6, "copies are spread over the order of the pool"


def test_planting_is_repeatable_and_seeded(tmp_path: Path) -> None:
    first = planted(tmp_path, "a", share=0.2, kinds=["swapped", "repeated"])
    assert set(first[2].values()) == {"swapped", "repeated"}
    assert planted(tmp_path, "b", share=0.2, kinds=["swapped", "repeated"]) == first
    assert planted(tmp_path, "c", share=0.2, kinds=["swapped", "repeated"], seed=1)[0] != first[0]
    one, two = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert one.identity == two.identity


def test_a_pool_that_cannot_be_planted_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": f"Say {n}", "completion": "x"} for n in range(10)])
    with pytest.raises(UserError, match=r"plant.share=0.35 needs 4 copies .truncated. in x; its rows give 0"):
        ingest(tmp_path, path, plant={"share": 0.35, "kinds": ["truncated"]})


def test_a_finished_output_is_returned_and_another_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [record(n) for n in range(20)])
    out = ingest(tmp_path, path)
    created = (out / "manifest.json").stat().st_mtime_ns
    assert ingest(tmp_path, path) == out
    assert (out / "manifest.json").stat().st_mtime_ns == created
    with pytest.raises(UserError, match="another run's output"):
        ingest(tmp_path, path, holdout=3)
