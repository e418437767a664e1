"""Pools on disk. Run: pytest tests/unit/test_pool.py"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from selectmoe.errors import UserError
from selectmoe.pool import Row, content_hash, content_id, locate, read_pool, write_pool


def rows(n: int, dataset: str = "cot") -> list[Row]:
    made = []
    for i in range(n):
        messages = [{"role": "user", "content": f"é {i}?"}, {"role": "assistant", "content": f"yes {i}"}]
        made.append(Row(dataset, content_id(dataset, messages), messages))
    return made


def test_rows_come_back_in_the_order_of_their_keys(tmp_path: Path) -> None:
    pool = rows(20) + rows(7, "dolly")
    write_pool(tmp_path, pool)
    assert read_pool(tmp_path) == sorted(pool, key=lambda r: r.key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cot.parquet", "dolly.parquet"]


def test_the_bytes_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    pool = rows(50)
    write_pool(tmp_path / "a", pool)
    write_pool(tmp_path / "b", random.Random(0).sample(pool, len(pool)))
    assert (tmp_path / "a/cot.parquet").read_bytes() == (tmp_path / "b/cot.parquet").read_bytes()


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


def test_locate_takes_the_output_of_ingest_or_a_part_of_it(tmp_path: Path) -> None:
    for part in ("pool", "holdout"):
        write_pool(tmp_path / part, rows(1))
        (tmp_path / part / "manifest.json").write_text("{}")
    assert locate(tmp_path) == tmp_path / "pool"
    assert locate(str(tmp_path), "holdout") == tmp_path / "holdout"
    assert locate(tmp_path / "holdout") == tmp_path / "holdout"


def test_locate_says_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        locate(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        locate(tmp_path / "nothing")


def test_a_folder_that_is_no_pool_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a pool"):
        read_pool(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a pool's Parquet"):
        read_pool(tmp_path)
