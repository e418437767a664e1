"""Ids, subsets and the holdout from an index, beside plain rules. Run: pytest tests/unit/test_table.py"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st
from plain_rows import Given, divided, salted, with_ids

from selectmoe import spool, table
from selectmoe.pool import Message, Row, content_hash
from selectmoe.table import HASHES, Table


def read(
    rows: Iterable[Given], pieces: int = 1, draw: bytes = b"draw"
) -> tuple[dict[str, Table], dict[bytes, list[Message]]]:
    """The tables of rows, and their messages by the first 16 bytes of their content's hash."""
    rows = list(rows)
    texts = {bytes.fromhex(content_hash(m))[:16]: m for _, _, m in rows}
    with TemporaryDirectory() as folder:
        files = [spool.Spool(Path(folder), worker) for worker in range(2)]
        places = []
        for n in range(pieces):
            out = files[n % 2]
            place = out.place()
            for dataset, own, messages in rows[n::pieces]:
                out.add(place, dataset, messages, own, draw)
            places.append(place)
        for out in files:
            out.close()
        return table.tables(Path(folder), places), texts


def shown(found: Table, texts: dict[bytes, list[Message]]) -> list[Row]:
    contents = [row.astype(">u8").tobytes() for row in found.rows["content"]]
    return [Row(found.name, name, texts[c]) for name, c in zip(found.ids.to_pylist(), contents, strict=True)]


def talk(n: int) -> list[Message]:
    return [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]


IDS = st.one_of(
    st.just(""), st.sampled_from(["a", "a-2", "a-3", "a-2-2", "-2", "-", "a-02", "b"]), st.text("a-29é𝒳", max_size=4)
)
ROWS = st.lists(st.tuples(st.sampled_from(["x", "y", "x-2"]), IDS, st.integers(0, 5).map(talk)), max_size=40)


@given(ROWS, st.integers(1, 4))
def test_spec7_27_ids_are_those_of_the_plain_rules(rows: list[Given], pieces: int) -> None:
    tables, texts = read(rows, pieces)
    found = [row for name in tables for row in shown(table.identified(tables[name]), texts)]
    assert found == with_ids(rows)


def test_many_rows_of_one_id_and_content_are_numbered() -> None:
    rows: list[Given] = [("x", "7", talk(1))] * 1000 + [("x", "7-5", talk(2))]
    tables, _ = read(rows)
    ids = table.identified(tables["x"]).ids.to_pylist()
    assert set(ids) == {"7", "7-5", *(f"7-{k}" for k in range(2, 1002) if k != 5)}
    assert ids == sorted(ids)


@given(ROWS, st.floats(0.01, 1), st.one_of(st.none(), st.integers(1, 9)), st.randoms())
def test_subsets_depend_on_contents_alone(rows: list[Given], ratio: float, limit: int | None, random) -> None:  # type: ignore[no-untyped-def]
    tables, texts = read(rows, 2, b"salt")
    random.shuffle(rows)
    again, _ = read(rows, 3, b"salt")
    for name, found in tables.items():
        mine = [(own, m) for dataset, own, m in rows if dataset == name]
        wanted = [(own, m) for own, m in mine if ratio >= 1 or salted(m, "salt") < int(ratio * HASHES)]
        wanted.sort(key=lambda pair: (salted(pair[1], "salt"), content_hash(pair[1]), pair[0]))
        kept = [(row.id, row.messages) for row in shown(table.drawn(found, ratio, limit), texts)]
        assert sorted(kept, key=str) == sorted(wanted[:limit], key=str)
        other = [(row.id, row.messages) for row in shown(table.drawn(again[name], ratio, limit), texts)]
        assert sorted(other, key=str) == sorted(kept, key=str)


@given(ROWS, st.one_of(st.just(0), st.just(HASHES), st.integers(0, HASHES)))
def test_the_holdout_has_every_content_once_and_the_pool_none_of_them(rows: list[Given], below: int) -> None:
    tables, texts = read(rows, 2)
    found = {name: table.identified(t) for name, t in tables.items()}
    keys = {name: [row.key for row in shown(t, texts)] for name, t in found.items()}
    splits = table.split(found, below)
    holdout = [keys[name][n] for name, part in splits.items() for n in part.holdout]
    copies = [keys[name][n] for name, part in splits.items() for n in part.copies]
    pool = [keys[name][n] for name, part in splits.items() for n in part.pool]
    plain = [[row.key for row in part] for part in divided(with_ids(rows), below)]
    assert [pool, holdout, copies] == plain
    assert table.duplicates(found) == len(rows) - len({content_hash(m) for _, _, m in rows})


@given(ROWS, st.integers(0, 8))
def test_a_number_of_contents_is_exact(rows: list[Given], wanted: int) -> None:
    tables, _ = read(rows)
    found = {name: table.identified(t) for name, t in tables.items()}
    splits = table.split(found, table.threshold(found, wanted))
    contents = len({content_hash(m) for _, _, m in rows})
    assert sum(len(part.holdout) for part in splits.values()) == min(wanted, contents)
