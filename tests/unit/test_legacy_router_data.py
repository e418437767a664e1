"""The predecessor's router data: `pytest tests/unit/test_legacy_router_data.py` (with a real judge: `test_route.py`)."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectmoe import legacy_router_data as legacy
from selectmoe import router_data as rd
from selectmoe import router_data_writing as rdw
from selectmoe import select
from selectmoe.cache import identity_of
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest, sha256_file
from selectmoe.pool import Row
from selectmoe.scores import available, score
from selectmoe.select import SelectConfig
from tests.pools import make_pool, make_router_data
from tests.unit.test_router_data import router_data


def content(n: int = 6, name: str = "cot", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Any]:
    """A file's dict as the predecessor saved it."""
    generator = torch.Generator().manual_seed(n)
    probs = torch.softmax(torch.randn(n, 3, 4, generator=generator), -1)
    made = {
        "quality_score": torch.randn(n, 3, 1, generator=generator).to(dtype),
        "moe_logits": probs.to(dtype),
        "sample_ids": [f"{name}-row-{'abcdefgh'[i]}" for i in range(n)],
        "dataset_name": name,
        "num_samples": n,
        "metadata": {"num_layers": 3},
    }
    return made | changes


def save(folder: Path, name: str = "cot", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{legacy.SUFFIX}"
    torch.save(content(**{"name": name, **changes}), path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_files_are_read_by_every_name_of_their_place(tmp_path: Path, dtype: torch.dtype) -> None:
    for name in ("dolly", "cot"):
        file = save(tmp_path / "run" / "router_data", name, dtype=dtype)
    folder = file.parent
    data = rd.read_router_data(folder)
    assert data.keys == sorted((name, i) for name in ("cot", "dolly") for i in content(name=name)["sample_ids"])
    raw = content(name="cot", dtype=dtype)
    assert np.array_equal(data.quality_score[:6], raw["quality_score"][:, :, 0].float().numpy())
    assert np.array_equal(data.router_probs[:6], raw["moe_logits"].float().numpy())
    assert rd.locate(tmp_path / "run") == rd.locate(folder) == folder
    assert rd.read_router_data(file).keys == data.keys[:6]
    assert rd.read_router_data([folder / "cot_router_data.pt", folder / "dolly_router_data.pt"]).keys == data.keys
    assert [part.rows for part in rd.open_parts(folder)] == [6, 6]


def test_what_a_file_does_not_hold_is_absent(tmp_path: Path) -> None:
    data = rd.read_router_data(save(tmp_path))
    for name in ("tokens", "answer_tokens", "answer_bytes", "batch"):
        assert (getattr(data, name) == -1).all(), name
    assert np.isnan(data.nll).all()
    assert data.good_ratio.shape == data.good_ratio_answer.shape == (6, 0)
    assert available(data) == ["legacy"]
    for name in ("answer", "all", "nll", "ifd", "combined"):
        with pytest.raises(UserError, match=f"no score '{name}'.*they have legacy"):
            score(data, name)


def test_the_identity_of_a_folder_is_its_files(tmp_path: Path) -> None:
    save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one = identity_of(str(rd.locate(tmp_path / "a")))
    assert identity_of(str(rd.locate(tmp_path / "b"))) == one
    save(tmp_path / "b", "dolly")
    assert identity_of(str(rd.locate(tmp_path / "b"))) != one


@pytest.mark.parametrize("parts", [1, 5])
def test_spec7_19_26_export_and_import_keep_ids_and_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    data = router_data(50)
    data.quality_score[3], data.router_probs[4] = np.nan, 0
    monkeypatch.setattr(rdw, "PART_BYTES", 25 * 96 // parts)
    output = make_router_data(tmp_path / "route", data)
    legacy.export_all(output)
    files = sorted(output.glob(legacy.EXPORTED))
    assert [file.name for file in files] == ["d0_router_data.pt", "d1_router_data.pt"]
    assert len(list((output / rd.FOLDER / "d0").glob("*.safetensors"))) == parts
    (tmp_path / "old").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "old")
    back = rd.read_router_data(tmp_path / "old")
    assert back.keys == data.keys
    assert np.array_equal(back.quality_score, data.quality_score, equal_nan=True)
    assert np.array_equal(back.router_probs, data.router_probs)
    assert np.array_equal(score(back, "legacy"), score(data, "legacy"), equal_nan=True)
    saved = torch.load(files[0], weights_only=True)
    assert set(saved) == {*legacy.KEYS, "metadata"}
    assert saved["quality_score"].shape == (25, 3, 1)
    assert saved["moe_logits"].dtype == torch.float32
    assert saved["metadata"]["identity"] == read_manifest(output / rd.FOLDER / "d0").identity
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    assert buffer.getvalue() == files[0].read_bytes()


def test_exported_bytes_do_not_depend_on_place_or_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for size, name in ((rdw.PART_BYTES, "a"), (700, "bb")):
        monkeypatch.setattr(rdw, "PART_BYTES", size)
        output = make_router_data(tmp_path / name, router_data(30))
        monkeypatch.setattr(legacy, "read_manifest", lambda *a, **k: read_manifest(tmp_path / "a" / rd.FOLDER / "d0"))
        legacy.export(output / rd.FOLDER / "d0", tmp_path / f"{name}.pt")
        digests.add(sha256_file(tmp_path / f"{name}.pt"))
    assert len(digests) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("a", "bb")]


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    data = router_data(10)
    data.quality_score = data.quality_score[:, :0]
    output = make_router_data(tmp_path / "route", data)
    with pytest.raises(UserError, match=r"needs a judge with gates and routers: there is no quality_score"):
        legacy.export_all(output)
    named = router_data(10)
    named.dataset = ["d0_router_data.pt" if name == "d1" else name for name in named.dataset]
    with pytest.raises(UserError, match="has the name of the file"):
        legacy.export_all(make_router_data(tmp_path / "named", named))


class Code:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": Code()}, "something else than tensors"),
        ({"dataset_name": "dolly"}, "holds dataset 'dolly': is it renamed"),
        ({"dataset_name": "../x"}, "no name of a dataset"),
        ({"num_samples": 7}, "num_samples 7"),
        ({"sample_ids": ["a"] * 6}, "row 'a' is there twice"),
        ({"sample_ids": ["a", "b"]}, "2 sample_ids"),
        ({"sample_ids": [1.5] * 6}, "strings or whole numbers"),
        ({"quality_score": torch.zeros(6, 3)}, r"quality_score has shape \[6, 3\]"),
        ({"quality_score": torch.zeros(6, 2, 1)}, "do not fit"),
        ({"quality_score": torch.zeros(6, 3, 1, dtype=torch.int64)}, "float32 or bfloat16"),
        ({"moe_logits": torch.zeros(5, 3, 4)}, "do not fit"),
        ({"moe_logits": torch.zeros(6, 3, 0)}, "has shape"),
        ({"moe_logits": [1]}, "must be a tensor"),
        ({"moe_logits": torch.full((6, 3, 4), -1.0)}, "of row 'cot-row-a' are no probabilities"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_foreign_files_are_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = save(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        rd.read_router_data(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("other", [b"", b"x" * 100, pickle.dumps({"a": 1}), pickle.dumps(Code())])
def test_what_torch_did_not_save_is_refused(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "cot_router_data.pt"
    path.write_bytes(other)
    with pytest.raises(UserError, match="is damaged, or no file that torch saved"):
        rd.read_router_data(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="it holds no dict"):
        rd.read_router_data(path)
    torch.save({key: 1 for key in legacy.KEYS if key != "sample_ids"}, path)
    with pytest.raises(UserError, match="sample_ids is missing"):
        rd.read_router_data(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, rd.RouterData]:
    path = save(tmp_path_factory.mktemp("sound"), dtype=torch.float32)
    return path, path.read_bytes(), rd.read_router_data(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused_or_says_the_same(
    sound: tuple[Path, bytes, rd.RouterData], tmp_path: Path, at: float, bit: int, cut: bool
) -> None:
    _, good, data = sound
    bad = bytearray(good)
    bad[int(at * len(bad))] ^= 1 << bit
    path = tmp_path / "cot_router_data.pt"
    path.write_bytes(bad[: int(at * len(bad))] if cut else bad)
    back = refusal = None
    try:
        back = rd.read_router_data(path)
    except UserError as error:
        refusal = str(error)
    if back is None:
        assert "\n" not in str(refusal)
        assert "cot_router_data.pt" in str(refusal)
        return
    assert not cut
    assert back.keys == data.keys
    assert np.array_equal(back.quality_score, data.quality_score)
    assert np.array_equal(back.router_probs, data.router_probs)


def test_files_among_others_need_the_manifest_around_them(tmp_path: Path) -> None:
    file = save(tmp_path / "router_data")
    (tmp_path / "router_data" / "notes.txt").write_text("x")
    for place in (tmp_path, tmp_path / "router_data"):
        with pytest.raises(UserError, match=r"holds notes\.txt beside NAME_router_data\.pt"):
            rd.locate(place)
    assert rd.locate(file) == file
    with pytest.raises(UserError, match="does not exist"):
        rd.locate(tmp_path / "router_data" / "dolly_router_data.pt")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        rd.locate(tmp_path / "router_data" / "notes.txt")


def test_a_row_that_is_in_two_places_is_found(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b")
    with pytest.raises(UserError, match="row 'cot-row-a' of dataset 'cot' is there twice"):
        rd.read_router_data([a, b])


def choose(tmp_path: Path, place: Path, pool: Path, **values: Any) -> Path:
    paths = {"router_data_dir": str(place), "data": str(pool), "output_dir": str(tmp_path / "out")}
    return select.run(load(SelectConfig, {}, **paths, **values))


def test_imported_data_can_be_selected_from(tmp_path: Path) -> None:
    data = router_data(40)
    output = make_router_data(tmp_path / "route", data)
    legacy.export_all(output)
    (tmp_path / "old").mkdir()
    for file in output.glob(legacy.EXPORTED):
        file.rename(tmp_path / "old" / file.name)
    rows = [Row(d, i, [{"role": "assistant", "content": d + i}]) for d, i in data.keys]
    pool = make_pool(tmp_path / "pool", rows)
    given = {"picking": "legacy", "clustering_params.k": 3, "selection_rows": 9}
    old = choose(tmp_path / "1", tmp_path / "old", pool, score="legacy", **given)
    new = choose(tmp_path / "2", output, pool, score="legacy", **given)
    chosen = [(out / "selected_data.jsonl").read_text().splitlines() for out in (old, new)]
    assert len(chosen[0]) == 9
    assert [json.loads(line)["id"] for line in chosen[0]] == [json.loads(line)["id"] for line in chosen[1]]
    for values in ({}, {"method": "top", "score": "nll"}):
        with pytest.raises(UserError, match=r"the router data have no score .*; they have legacy"):
            choose(tmp_path / "3", tmp_path / "old", pool, **values)
    for values in ({"method": "length"}, {"score": "legacy", "selection_tokens": 100}):
        with pytest.raises(UserError, match="need token counts"):
            choose(tmp_path / "3", tmp_path / "old", pool, **values)
    for method in ("router_only", "random"):
        choose(tmp_path / method, tmp_path / "old", pool, method=method)
    assert not (tmp_path / "3" / "out").exists()


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [f"cot_{i}" for i in range(6)]])
def test_spec7_26_positions_are_not_joined_with_another_number_of_rows(tmp_path: Path, ids: list[Any]) -> None:
    """The predecessor joined 500 of 500 rows with another row's text."""
    place = save(tmp_path / "old", sample_ids=ids)
    more = [*map(str, ids), str(ids[0]).replace("0", "6")]
    for n, refused in ((6, False), (7, True)):
        rows = [Row("cot", i, [{"role": "assistant", "content": i}]) for i in more[:n]]
        pool = make_pool(tmp_path / str(n), rows)
        if refused:
            with pytest.raises(UserError, match=r"are positions \(.*0 to .*5\), and the pool has 7 rows"):
                choose(tmp_path / "refused", place, pool, score="legacy")
        else:
            choose(tmp_path / "joined", place, pool, score="legacy")
