"""Whatever is in the files: no crash, no row lost, none altered. Run: pytest tests/unit/test_ingest_property.py"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_rows import Given, divided, row_of, with_ids

from selectmoe import manifest as mf
from selectmoe import records
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.ingest import IngestConfig, run
from selectmoe.pool import DATASET_NAME, Row, datasets, iter_rows, locate
from selectmoe.table import HASHES

TEXT = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=10),
    st.sampled_from(["\0", "\ud800", "\udc00\ud800", "\u202eabc\u202c", "\U0001f468\u200d\U0001f469", "\r\n", "\u2028", '"\\', " \t", "é", "e\u0301", "\ufeff"]),
)  # fmt: skip
KEYS = st.sampled_from(
    ["messages", "conversations", "role", "content", "from", "value", "instruction", "input", "output", "response"]
    + ["context", "prompt", "completion", "system", "system_prompt", "id", "dataset", "tool_calls", "x", "\ud800"]
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=15,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool"]), "content": TEXT},
    optional={"tool_calls": st.sampled_from([None, [], [{"name": "f"}]]), "name": TEXT},
)
FALSY = st.sampled_from([None, "", 0, False, [], {}, " ", "more"])
NEARLY = st.fixed_dictionaries(
    {"messages": st.lists(st.one_of(TURN, TURN, ANY), max_size=4)},
    optional={"id": st.one_of(st.integers(0, 5), TEXT), "system": TEXT, "dataset": st.sampled_from(["b", "a b"])},
)
GOOD = st.tuples(TEXT, st.integers(0, 3)).map(
    lambda pair: {
        "messages": [{"role": "user", "content": "?" + pair[0]}, {"role": "assistant", "content": str(pair[1])}]
    }
)
PAIRS = st.sampled_from([("instruction", "output"), ("instruction", "response"), ("prompt", "completion")]).flatmap(
    lambda keys: st.fixed_dictionaries(
        dict.fromkeys(keys, TEXT), optional={"input": FALSY, "context": FALSY, "system": FALSY, "id": st.integers()}
    )
)
SHARE = st.fixed_dictionaries(
    {"conversations": st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXT}), max_size=3)},
    optional={"system": TEXT, "system_prompt": TEXT},
)  # fmt: skip
RECORDS = st.lists(st.one_of(ANY, NEARLY, GOOD, GOOD, PAIRS, SHARE), max_size=25)


def line(record: Any) -> str:
    return json.dumps(record)


def strict(text: str) -> bool:
    """Whether a line is JSON without NaN, Infinity."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def out_of(folder: Path) -> list[Row]:
    return [row for place in datasets(folder).values() for row in iter_rows(place)] if any(folder.glob("*/*")) else []


def key(row: Row) -> tuple[str, str, str]:
    return (row.dataset, row.id, json.dumps(row.messages))


@given(
    RECORDS, st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]), st.floats(0, 0.5), st.randoms(use_true_random=False)
)
@settings(max_examples=150)
def test_no_row_is_lost_or_altered(found: list[Any], name: str, holdout: float, chance: random.Random) -> None:
    lines = [line(record) for record in found]
    rows: list[Given] = []
    bad: list[tuple[int, Any]] = []
    for number, text in enumerate(lines, 1):
        record = json.loads(text) if strict(text) else None
        made = row_of(record)
        dataset = record.get("dataset", "a") if made else ""
        if made is None or not isinstance(dataset, str) or not DATASET_NAME.fullmatch(dataset):
            bad.append((number, record if strict(text) else text))
        else:
            rows.append((dataset, *made))
    pool, held, copies = divided(with_ids(rows), int(holdout * HASHES))
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        whole = f"[{', '.join(lines)}]" if name == "a.json" else "".join(text + "\n" for text in lines)
        path.write_bytes(gzip.compress(whole.encode()) if name.endswith("gz") else whole.encode())
        config = load(IngestConfig, {"max_rejected": 1, "holdout": holdout}, data=str(path), output_dir=f"{folder}/out")
        if not pool or (holdout and not held):
            with pytest.raises(UserError):
                run(config)
            assert not Path(folder, "out").exists()
            return
        out = run(config)
        assert sorted(map(key, out_of(locate(out)))) == sorted(map(key, pool))
        assert out_of(locate(out)) == pool
        assert out_of(locate(out, "holdout")) == held
        rejected = [json.loads(text) for text in (out / "rejected.jsonl").read_text().splitlines()]
        assert [(r["line"], r["record"]) for r in rejected if "line" in r] == bad
        assert all(r["reason"] and r["file"] == name and r["dataset"] == "a" for r in rejected if "line" in r)
        assert [(r["dataset"], r["id"], r["record"]["messages"]) for r in rejected if "line" not in r] == [
            (row.dataset, row.id, row.messages) for row in copies
        ]
        counted = mf.read_manifest(out).rows
        assert counted["in"] == len(found) == counted["out"] + sum(counted["dropped"].values())
        assert counted["out"] == len(pool) + len(held)
        (report,) = json.loads((out / "sources.json").read_text())["files"]
        assert (report["records"], report["rows"]) == (len(found), len(rows))
        assert sum(report["rejected"].values()) == len(bad)


def same(a: Path, b: Path) -> bool:
    """Whether two outputs have the same files and identities; times apart."""
    files = [sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) for out in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith("manifest.json"):
            one, two = (mf.read_manifest((out / name).parent) for out in (a, b))
            assert one.identity == two.identity, name
        elif not name.startswith((".hydra", "logs", "metrics")):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    return True


def test_the_same_bytes_at_any_number_of_workers_and_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    rows = [
        {"messages": [{"role": "user", "content": f"q {chance.randrange(400)}"}, {"role": "assistant", "content": "é" * (n % 9 + 1)}]}
        | ({"id": f"own-{n % 50}"} if n % 3 == 0 else {})
        for n in range(1200)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows] + ["{broken"] * 3
    outs = []
    for at, workers in enumerate((1, 2, 3, 1)):
        for source in ("cot", "flan"):
            folder = tmp_path / str(at) / source
            folder.mkdir(parents=True)
            files = {"a.jsonl": lines[:600], "b.jsonl": lines[600:]}
            if at == 3:  # pieces of another size; the lines of a file in another order, but for those that are refused
                good = files["a.jsonl"]
                chance.shuffle(good)
                files["a.jsonl"] = good
            for name, mine in files.items():
                (folder / name).write_text("".join(text + "\n" for text in mine))
        monkeypatch.setattr(records, "PIECE", 1 << 20 if at == 0 else 9000)
        settings = {"workers": workers, "holdout": 0.1, "dataset": {"limits": {"flan": 500}, "subset_ratio": 0.9}}
        outs.append(
            run(load(IngestConfig, settings, data=str(tmp_path / str(at)), output_dir=str(tmp_path / f"out{at}")))
        )
    assert same(outs[0], outs[1])
    assert same(outs[0], outs[2])
    for part in ("pool", "holdout"):
        assert out_of(locate(outs[0], part)) == out_of(locate(outs[3], part))
        for name in ("cot", "flan"):
            one, two = (sorted((out / part / name).glob("*.parquet")) for out in (outs[0], outs[3]))
            assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_string_of_ten_megabytes(tmp_path: Path) -> None:
    long = '\0\u202e\U0001f600"\\ é' * 800_000
    assert len(long.encode()) > 10_000_000
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": long}]}
    for name in ("a.jsonl", "b.json"):
        text = line(record) + "\n"
        (tmp_path / name).write_text(text if name == "a.jsonl" else f"[{text}]")
        config = load(IngestConfig, {"holdout": 0}, data=str(tmp_path / name), output_dir=str(tmp_path / f"out-{name}"))
        (row,) = out_of(locate(run(config)))
        assert row.messages == record["messages"]
