"""Pools on disk. Run: pytest tests/unit/test_pool.py"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe import manifest as mf
from selectmoe import pool
from selectmoe.errors import UserError
from selectmoe.pool import (
    Row,
    content_hash,
    content_id,
    datasets,
    iter_rows,
    locate,
    read_pool,
    row_ids,
    write_dataset,
    write_pool,
)
from tests.pools import make_pool


def rows(n: int, dataset: str = "cot") -> list[Row]:
    made = []
    for i in range(n):
        messages = [{"role": "user", "content": f"é {i}?"}, {"role": "assistant", "content": f"yes {i}"}]
        made.append(Row(dataset, content_id(dataset, messages), messages))
    return made


def test_rows_come_back_in_the_order_of_their_keys(tmp_path: Path) -> None:
    made = rows(20) + rows(7, "dolly")
    write_pool(tmp_path, made)
    assert read_pool(tmp_path) == sorted(made, key=lambda r: r.key)
    assert datasets(tmp_path) == {"cot": tmp_path / "cot", "dolly": tmp_path / "dolly"}
    assert read_pool(tmp_path / "dolly") == list(iter_rows(tmp_path / "dolly")) == read_pool(tmp_path)[20:]
    assert datasets(tmp_path / "dolly") == {"dolly": tmp_path / "dolly"}


def test_the_bytes_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    made = rows(50)
    write_pool(tmp_path / "a", made)
    write_pool(tmp_path / "b", random.Random(0).sample(made, len(made)))
    assert (tmp_path / "a/cot/00000.parquet").read_bytes() == (tmp_path / "b/cot/00000.parquet").read_bytes()


def test_ids_come_from_the_content_alone() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert content_id("cot", messages) == "cot-" + content_hash(messages)[:16]
    assert content_hash(messages) == content_hash([{"content": m["content"], "role": m["role"]} for m in messages])
    assert content_hash(messages) != content_hash(messages[::-1])


def test_two_rows_with_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two rows"):
        write_pool(tmp_path, rows(1) * 2)


def test_a_dataset_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file name"):
        write_pool(tmp_path, rows(1, "../x"))


def ordered(n: int) -> list[Row]:
    return sorted(rows(n), key=lambda row: row.id)


def test_rows_out_of_order_or_of_two_datasets_are_refused(tmp_path: Path) -> None:
    good = ordered(3)
    with pytest.raises(ValueError, match=r"after 'cot-.*' comes the id 'cot-"):
        write_dataset(tmp_path / "a", good[::-1])
    with pytest.raises(ValueError, match="two rows have the id"):
        write_dataset(tmp_path / "b", [*good, good[-1]])
    with pytest.raises(ValueError, match="rows of cot and dolly"):
        write_dataset(tmp_path / "c", [*good, *rows(1, "dolly")])


def test_files_and_row_groups_are_cut_by_rows_and_by_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FILE_ROWS": 7, "ROW_GROUP": 3, "FILE_TEXT": 300, "GROUP_TEXT": 100}.items():
        monkeypatch.setattr(pool, name, value)
    made = [Row("cot", f"{n:02d}", [{"role": "assistant", "content": "é" * (60 if n == 9 else 4)}]) for n in range(20)]
    assert write_dataset(tmp_path / "cot", made) == 20
    found = {}
    for path in sorted((tmp_path / "cot").iterdir()):
        file = pq.ParquetFile(path)
        found[path.name] = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert found == {"00000.parquet": [3, 3, 1], "00001.parquet": [2, 1, 3, 1], "00002.parquet": [3, 3]}
    assert list(iter_rows(tmp_path / "cot")) == made
    assert list(row_ids(tmp_path / "cot")) == [row.id for row in made]


def test_locate_takes_the_output_of_ingest_or_a_part_of_it(tmp_path: Path) -> None:
    for part in ("pool", "holdout"):
        write_pool(tmp_path / part, rows(1))
        (tmp_path / part / "manifest.json").write_text("{}")
    assert locate(tmp_path) == tmp_path / "pool"
    assert locate(str(tmp_path), "holdout") == tmp_path / "holdout"
    assert locate(tmp_path / "holdout") == tmp_path / "holdout"
    (tmp_path / "pool" / "cot" / "manifest.json").write_text("{}")
    assert locate(tmp_path / "pool" / "cot") == tmp_path / "pool" / "cot"


def test_locate_says_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        locate(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        locate(tmp_path / "nothing")


def test_a_folder_that_is_no_pool_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a pool"):
        read_pool(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x.parquet, which is not a pool's Parquet file of this version"):
        read_pool(tmp_path)
    (tmp_path / "x.parquet").rename(tmp_path / "00000.parquet")
    with pytest.raises(UserError, match="not a pool's Parquet"):
        read_pool(tmp_path)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "00000.parquet")
    with pytest.raises(UserError, match="has the columns"):
        read_pool(tmp_path)


def finished(folder: Path) -> mf.Manifest:
    """A pool of two datasets, each with its manifest, and the whole one's."""
    make_pool(folder, rows(3) + rows(3, "pool"))
    return mf.read_manifest(folder)


def test_a_pool_is_proved_with_its_datasets(tmp_path: Path) -> None:
    made = finished(tmp_path / "a")
    assert made.parts == ["cot", "pool"]
    assert locate(tmp_path / "a") == tmp_path / "a", "one of its datasets is called pool"
    assert list(datasets(tmp_path / "a")) == ["cot", "pool"]

    def changed(place: Path) -> None:
        place.write_bytes(place.read_bytes() + b" ")

    damages: dict[str, Callable[[Path], object]] = {
        r"cot/\S+ is missing": lambda a: shutil.rmtree(a / "cot"),
        r"more/manifest\.json is foreign": lambda a: shutil.copytree(a / "cot", a / "more"),
        r"cot/00000\.parquet does not have the bytes": lambda a: changed(a / "cot" / "00000.parquet"),
        r"cot/manifest\.json is missing": lambda a: (a / "cot" / "manifest.json").unlink(),
        r"cot/00001\.parquet is foreign": lambda a: changed_name(a / "cot"),
    }
    for message, damage in damages.items():
        shutil.rmtree(tmp_path / "a")
        finished(tmp_path / "a")
        damage(tmp_path / "a")
        with pytest.raises(UserError, match=message):
            mf.identity_of(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "cot")
    with pytest.raises(UserError, match="cot is missing"):
        datasets(tmp_path / "a")


def changed_name(folder: Path) -> None:
    shutil.copyfile(folder / "00000.parquet", folder / "00001.parquet")
