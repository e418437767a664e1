"""Subsets, weights, the holdout's threshold, and what another dataset leaves as it is: pytest tests/unit/test_division.py"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from plain_rows import Given, divided, salted, with_ids

from selectmoe import division
from selectmoe import manifest as mf
from selectmoe.config import load
from selectmoe.division import holdout_size, weighted
from selectmoe.errors import UserError
from selectmoe.ingest import NOT_DRAWN, IngestConfig, run, survey
from selectmoe.pool import Message, locate, read_pool
from selectmoe.table import HASHES


def talk(n: int) -> list[Message]:
    return [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"answer {n}"}]


def write(folder: Path, **sizes: range) -> Path:
    folder.mkdir(exist_ok=True)
    for name, numbers in sizes.items():
        lines = [json.dumps({"messages": talk(n)}) + "\n" for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def config(data: Path, out: Path, **settings: Any) -> IngestConfig:
    return load(IngestConfig, settings, data=str(data), output_dir=str(out))


def ingest(tmp_path: Path, data: Path, name: str = "out", **settings: Any) -> Path:
    return run(config(data, tmp_path / name, **settings))


def sizes(out: Path, part: str = "pool") -> dict[str, int]:
    return dict(Counter(row.dataset for row in read_pool(locate(out, part))))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet")}


A, B, C = range(300), range(200, 500), range(100, 450)
"""Datasets that share contents."""


@pytest.mark.parametrize(
    "settings",
    [
        {"holdout": 0.1},
        {"holdout": 0},
        {"holdout": 0.2, "dataset": {"subset_ratio": 0.5, "limits": {"b": 100}, "schemas": {"b": "messages"}}},
        {"holdout": 0.1, "plant": {"share": 0.3}},
        {},
    ],
)
def test_another_dataset_leaves_the_others_as_they_were(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "HOLDOUT_ROWS", 2)  # the default is a share from 100 rows on
    two = ingest(tmp_path, write(tmp_path / "two", b=B, c=C), "out2", **settings)
    three = ingest(tmp_path, write(tmp_path / "three", a=A, b=B, c=C), "out3", **settings)
    for name in ("b", "c"):
        one, other = (mf.read_manifest(out / "pool" / name) for out in (two, three))
        assert one.identity == other.identity
        assert one.config["identity"] == other.config["identity"]
        assert files(two / "pool" / name) == files(three / "pool" / name)
    wholes = [mf.read_manifest(out / "pool") for out in (two, three)]
    assert wholes[0].identity != wholes[1].identity
    assert {name: entry["identity"] for name, entry in wholes[1].inputs.items()}.items() >= {
        name: entry["identity"] for name, entry in wholes[0].inputs.items()
    }.items()
    assert wholes[1].parts == ["a", "b", "c"]
    if settings.get("holdout") != 0:
        contents = [{str(row.messages) for row in read_pool(locate(three, part))} for part in ("pool", "holdout")]
        assert not contents[0] & contents[1]


def test_a_dataset_that_changes_changes_its_own_identity_only(tmp_path: Path) -> None:
    outs = [
        ingest(tmp_path, write(tmp_path / str(n), a=range(90 + n), b=range(100, 200)), f"out{n}", holdout=0.1)
        for n in (0, 1)
    ]
    one, two = ({name: mf.read_manifest(out / "pool" / name).identity for name in ("a", "b")} for out in outs)
    assert one["b"] == two["b"]
    assert one["a"] != two["a"]


def test_a_share_is_a_threshold_and_a_number_is_exact(tmp_path: Path) -> None:
    data = write(tmp_path / "in", a=A, b=B)
    given: list[Given] = [("a", "", talk(n)) for n in A] + [("b", "", talk(n)) for n in B]
    for holdout in (0.1, 0.45):
        out = ingest(tmp_path, data, f"out{holdout}", holdout=holdout)
        pool, held, _ = divided(with_ids(given), int(holdout * HASHES))
        assert read_pool(locate(out)) == pool
        assert read_pool(locate(out, "holdout")) == held
    out = ingest(tmp_path, data, "number", holdout=77)
    smallest = sorted({salted(talk(n), "holdout") for n in range(500)})[77]
    assert read_pool(locate(out, "holdout")) == divided(with_ids(given), smallest)[1]
    assert len(read_pool(locate(out, "holdout"))) == 77
    assert mf.read_manifest(out / "pool" / "a").config["identity"]["holdout_below"] == f"{smallest:017x}"


def test_a_holdout_that_draws_nothing_or_everything_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "in", a=range(5))
    with pytest.raises(UserError, match=r"holdout=0\.0001 draws none of 5 rows: give a number of rows"):
        ingest(tmp_path, data, holdout=0.0001)
    with pytest.raises(UserError, match="would take all"):
        ingest(tmp_path, data, holdout=0.999)
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"messages": talk(1), "id": n}) + "\n" for n in range(9)))
    with pytest.raises(UserError, match="every row has the content of one in the holdout"):
        ingest(tmp_path, same, holdout=1)


def test_limits_subsets_and_weights(tmp_path: Path) -> None:
    data = write(tmp_path / "in", a=A, b=B, c=range(1000, 1040))
    cases: list[tuple[dict[str, Any], dict[str, int]]] = [
        ({"limit": 50}, {"a": 50, "b": 50, "c": 40}),
        ({"limit": 50, "limits": {"a": 70, "c": 3}}, {"a": 70, "b": 50, "c": 3}),
        ({"weights": {"a": 2, "b": 0.5, "c": 1}}, {"a": 80, "b": 20, "c": 40}),
        ({"weights": {"a": 0.3, "b": 0.1, "c": 0.1}, "limits": {"b": 30}}, {"a": 90, "b": 30, "c": 30}),
    ]
    for n, (dataset, wanted) in enumerate(cases):
        out = ingest(tmp_path, data, f"out{n}", holdout=0, dataset=dataset)
        assert sizes(out) == wanted
        rows = mf.read_manifest(out).rows
        assert rows == {"in": 640, "out": sum(wanted.values()), "dropped": {NOT_DRAWN: 640 - sum(wanted.values())}}
        assert survey(config(data, tmp_path / "x", holdout=0, dataset=dataset)).rows == sum(wanted.values())
    out = ingest(tmp_path, data, "ratio", holdout=0, dataset={"subset_ratio": 0.3})
    kept = {str(row.messages) for row in read_pool(locate(out)) if row.dataset == "a"}
    assert kept == {str(talk(n)) for n in A if salted(talk(n), "draw 42") < int(0.3 * HASHES)}
    assert (out / "rejected.jsonl").read_text() == "", "what was not drawn is only counted"


def test_who_draws_is_the_seed_unless_nothing_is_shuffled(tmp_path: Path) -> None:
    data = write(tmp_path / "in", a=A)
    rows, identities = [], []
    for n, (seed, shuffle) in enumerate([(1, True), (2, True), (1, False), (2, False)]):
        dataset = {"limit": 50, "shuffle": shuffle}
        out = ingest(tmp_path, data, f"out{n}", holdout=0, seed=seed, dataset=dataset)
        rows.append(read_pool(locate(out)))
        identities.append(mf.read_manifest(out / "pool" / "a").identity)
    assert rows[0] != rows[1]
    assert rows[2] == rows[3]
    assert identities[2] == identities[3] != identities[0]
    seeds = [ingest(tmp_path, data, f"whole{seed}", holdout=0, seed=seed) for seed in (1, 2)]
    assert len({mf.read_manifest(out / "pool" / "a").identity for out in seeds}) == 1, "nothing was drawn"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"limits": {"x": 3}}, "dataset.limits.x: there is no such dataset; there are: a, b"),
        ({"schemas": {"x": "alpaca"}}, "dataset.schemas.x: there is no such dataset"),
        ({"weights": {"x": 3, "a": 1, "b": 1}}, "dataset.weights.x: there is no such dataset"),
        ({"weights": {"a": 1}}, "names no weight for b"),
        ({"weights": {"a": 1, "b": 100000}}, "dataset a: not one of its 300 rows was drawn"),
        ({"weights": {"a": 0, "b": 1}}, r"dataset.weights.a=0.0 must be above 0"),
        ({"limit": 0}, "dataset.limit=0 must be at least 1"),
        ({"limits": {"a": -1}}, "dataset.limits.a=-1 must be at least 1"),
        ({"subset_ratio": 0}, "dataset.subset_ratio=0.0 must be above 0"),
        ({"subset_ratio": 1.5}, "at most 1"),
        ({"subset_ratio": 1e-9}, "dataset a: not one of its 300 rows was drawn"),
        ({"schema": "csv"}, "dataset.schema=csv is unknown; known: messages, sharegpt"),
        ({"schemas": {"a": "x/"}}, "dataset.schemas.a=x/ is unknown"),
    ],
)
def test_wrong_draws_are_named(tmp_path: Path, dataset: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "in", a=A, b=B)
    with pytest.raises(UserError, match=message):
        ingest(tmp_path, data, dataset=dataset)
    assert not (tmp_path / "out").exists()


def test_the_size_of_the_holdout() -> None:
    assert holdout_size(None, 100) == 20
    assert holdout_size(None, 5_000) == 200
    assert holdout_size(None, 50_000) == 1000
    assert holdout_size(0.1, 50) == 5
    assert holdout_size(30, 50) == 30
    assert holdout_size(0, 50) == 0
    with pytest.raises(UserError, match="would take all"):
        holdout_size(50, 50)


def test_weights_are_exact() -> None:
    assert weighted({"a": 100, "b": 100}, {"a": 0.1, "b": 0.3}) == {"a": 33, "b": 100}
    assert weighted({"a": 7}, {"a": 123.4}) == {"a": 7}


def test_a_survey_says_what_ingest_will_do(tmp_path: Path) -> None:
    data = write(tmp_path / "in", a=A, b=B)
    for n, settings in enumerate([{"holdout": 0.1}, {"holdout": 33}, {"dataset": {"limit": 60}}]):
        found = survey(config(data, tmp_path / "x", **settings))
        out = ingest(tmp_path, data, f"out{n}", **settings)
        pool, held = read_pool(locate(out)), read_pool(locate(out, "holdout"))
        copies = mf.read_manifest(out).rows["dropped"].get("exact duplicate of a row of the holdout", 0)
        assert (found.rows, found.held) == (len(pool) + len(held) + copies, len(held) + copies)
        if not copies:
            assert found.text == sum(len(m["content"]) for row in pool + held for m in row.messages)
            assert found.answers == sum(len(a) for row in pool + held for a in row.answers)
    assert not (tmp_path / "x").exists()
