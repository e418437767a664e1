"""Router data on disk: `pytest tests/unit/test_router_data.py`."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pytest

from selectmoe import router_data as rd
from selectmoe import router_data_writing as rdw
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest, sha256_file
from tests.pools import make_router_data


def router_data(n: int, layers: int = 3, experts: int = 4, seed: int = 0) -> rd.RouterData:
    """n rows of two datasets."""
    rng = np.random.default_rng(seed)
    keys = sorted((f"d{i % 2}", f"r{i:05d}") for i in range(n))
    quality = rng.normal(size=(2, n, layers)).astype(np.float32)
    ratio = (1 / (1 + np.exp(-quality))).astype(np.float32)
    probs = rng.dirichlet(np.ones(experts), size=(n, layers)).astype(np.float32)
    return rd.RouterData(
        dataset=[d for d, _ in keys],
        id=[i for _, i in keys],
        tokens=rng.integers(10, 99, n),
        answer_tokens=rng.integers(1, 9, n),
        truncated=rng.random(n) < 0.2,
        nll=rng.random(n) + 1,
        nll_unconditional=rng.random(n) + 2,
        answer_bytes=rng.integers(1, 99, n),
        quality_score=quality[0],
        good_ratio=ratio[0],
        quality_score_answer=quality[1],
        good_ratio_answer=ratio[1],
        router_probs=probs,
    )


def assert_same(a: rd.RouterData, b: rd.RouterData) -> None:
    for field in dataclasses.fields(rd.RouterData):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert np.array_equal(x, y, equal_nan=field.name.startswith(("nll", "quality", "good"))), field.name


def test_spec7_19_scores_come_back_with_every_bit_of_float32(tmp_path: Path) -> None:
    data = router_data(500)
    data.nll[3] = data.nll_unconditional[4] = np.nan
    data.good_ratio_answer[5] = np.nan
    output = make_router_data(tmp_path / "route", data)
    back = rd.read_router_data(output)
    assert_same(back, data)
    assert back.quality_score.dtype == back.router_probs.dtype == np.float32
    assert len(np.unique(back.quality_score[:, 0])) > 490  # bfloat16 leaves some 55 values
    assert_same(rd.read_router_data(output / rd.FOLDER), data)
    assert rd.locate(output / rd.FOLDER) == rd.locate(output) == output


def test_equal_rows_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    data = router_data(60)
    order = list(range(60))
    random.Random(1).shuffle(order)
    a, b = make_router_data(tmp_path / "a", data), make_router_data(tmp_path / "b", data.take(order))
    files = sorted(p.relative_to(a / rd.FOLDER).as_posix() for p in (a / rd.FOLDER).glob("*/0*"))
    assert files == [f"{d}/00000.{kind}" for d in ("d0", "d1") for kind in ("parquet", "safetensors")]
    for name in files:
        assert sha256_file(a / rd.FOLDER / name) == sha256_file(b / rd.FOLDER / name)


def test_files_are_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdw, "PART_BYTES", 1000)  # 96 bytes a row
    data = router_data(60)
    output = make_router_data(tmp_path / "route", data)
    names = {p.name for p in (output / rd.FOLDER / "d1").glob("*.safetensors")}
    assert names == {f"0000{part}.safetensors" for part in (0, 1, 2)}
    assert_same(rd.read_router_data(output), data)


def test_several_outputs_are_read_together(tmp_path: Path) -> None:
    data = router_data(40)
    first = [i for i in range(40) if data.dataset[i] == "d0"]
    a = make_router_data(tmp_path / "a", data.take(first))
    b = make_router_data(tmp_path / "b", data.take([i for i in range(40) if i not in first]))
    assert_same(rd.read_router_data([b, a]), data)
    with pytest.raises(UserError, match="is there twice"):
        rd.read_router_data([a, b, a])


def test_spec7_26_rows_keep_their_ids_whatever_the_order(tmp_path: Path) -> None:
    data = router_data(40)
    sent = {key: data.quality_score[i].tobytes() for i, key in enumerate(data.keys)}
    order = random.Random(2).sample(range(40), 25)
    back = rd.read_router_data(make_router_data(tmp_path / "route", data.take(order)))
    assert back.keys == sorted(data.keys[i] for i in order)
    assert all(back.quality_score[i].tobytes() == sent[key] for i, key in enumerate(back.keys))


def test_what_is_not_finished_router_data_is_refused(tmp_path: Path) -> None:
    data = router_data(10)
    with pytest.raises(UserError, match="does not exist"):
        rd.read_router_data(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    rdw.write_router_data(tmp_path / "bare", data)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        rd.read_router_data(tmp_path / "bare" / "d0")
    with pytest.raises(UserError, match="output of stage 'ingest'"):
        rd.read_router_data(make_router_data(tmp_path / "ingest", data, stage="ingest"))
    with pytest.raises(UserError, match="shard 0 of 3 only: give all shards to `selectmoe merge`"):
        rd.read_router_data(make_router_data(tmp_path / "shard", data, stage=f"{rd.SHARD}0-of-3"))
    with pytest.raises(UserError, match="no row was routed"):
        rd.read_router_data(make_router_data(tmp_path / "empty", data.take([])))


def test_spec7_28_a_damaged_file_is_named(tmp_path: Path) -> None:
    output = make_router_data(tmp_path / "route", router_data(10))
    file = output / rd.FOLDER / "d1" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"d1/00000\.safetensors does not have the bytes"):
        rd.read_router_data(output / rd.FOLDER)
    file.unlink()
    with pytest.raises(UserError, match=r"d1/00000\.safetensors is missing"):
        rd.read_router_data(output)


def test_judges_of_different_shape_are_not_mixed(tmp_path: Path) -> None:
    a, b = make_router_data(tmp_path / "a", router_data(4)), make_router_data(tmp_path / "b", router_data(4, experts=8))
    with pytest.raises(UserError, match="different judges"):
        rd.read_router_data([a, b])


def test_every_single_bit_flip_truncation_and_foreign_file_is_found_by_name(tmp_path: Path) -> None:
    """Exhaustive: every bit of every file that is read, the manifests too."""
    output = make_router_data(tmp_path / "route", router_data(1, layers=1, experts=1))
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    assert len(files) == 4
    rd.read_router_data(output)
    for path in files:
        whole = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for at in range(len(whole)):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit]), at)
                    with pytest.raises(UserError) as error:
                        read_manifest(output)
                    assert path.name in str(error.value), (at, bit)
                os.pwrite(file.fileno(), whole[at : at + 1], at)
        for damaged in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                rd.read_router_data(output)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            rd.read_router_data(output)
        path.write_bytes(whole)
    for name in ("00001.parquet", "00001.safetensors"):
        copy = output / rd.FOLDER / "d0" / name
        copy.write_bytes((copy.parent / name.replace("1", "0")).read_bytes())
        with pytest.raises(UserError, match=f"{name} is foreign"):
            rd.read_router_data(output)
        copy.unlink()
    rd.read_router_data(output)
