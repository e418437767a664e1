"""`compare`: many selections side by side. Run: pytest tests/unit/test_compare.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe import baseline, compare
from selectmoe.baseline import BaselineConfig
from selectmoe.compare import CompareConfig
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.evaluate import RESULTS, Result, write_results
from selectmoe.manifest import read_manifest, write_manifest
from selectmoe.selection import read_selected

ARMS = ["selected", "random", "kmeans+drop-0.5", "kmeans+layers-1", "top-nll+budget-12"]


@pytest.fixture
def arms(routed_world: dict[str, str], tmp_path: Path) -> Path:
    nested = {"output_dir": str(tmp_path / "arms"), "threads": 1, "arms": ARMS, "seeds": [0], "selection_rows": 9}
    return baseline.run(load(BaselineConfig, {**nested, **routed_world}))


def go(arms: Path, **given: Any) -> tuple[Path, dict[str, Any]]:
    out = compare.run(
        load(CompareConfig, {"output_dir": str(arms.parent / "compared"), "selections": str(arms), **given})
    )
    return out, json.loads((out / "results.json").read_text())


def test_every_number_is_that_of_the_rows(arms: Path, tmp_path: Path) -> None:
    out, found = go(arms, planted=str(tmp_path / "planted.jsonl"))
    planted = {(r["dataset"], r["id"]) for r in map(json.loads, (tmp_path / "planted.jsonl").read_text().splitlines())}
    by_name = {entry["name"]: entry for entry in found["selections"]}
    assert {*by_name} == {*ARMS} - {"random"} | {"random-0"}
    keys = {}
    for name, entry in by_name.items():
        rows = read_selected(arms / name)
        keys[name] = {row.row.key for row in rows}
        assert entry["rows"] == len(rows) == (12 if name == "top-nll+budget-12" else 9)
        assert entry["planted_share"] == pytest.approx(len(keys[name] & planted) / len(rows))
        assert entry["mean_nll"] == pytest.approx(np.mean([row.scores["nll"] for row in rows]))
        assert sum(entry["sources"].values()) == len(rows)
    assert by_name["kmeans+drop-0.5"]["settings"]["filter.drop"] == 0.5
    one, two = sorted(["selected", "kmeans+layers-1"])
    expected = len(keys[one] & keys[two]) / len(keys[one] | keys[two])
    assert found["jaccard"][one][two] == pytest.approx(expected)
    assert found["verdict"]["verdict"] == compare.NOT_JUDGED
    text = (out / "summary.md").read_text()
    assert "| kmeans+drop-0.5 | 9 |" in text
    assert "filter.drop" in text, "the settings in which they differ are columns"
    page = (out / "compare.html").read_text()
    assert "kmeans+layers-1" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_rows_give_the_same_identity_and_others_another(arms: Path, tmp_path: Path) -> None:
    first = read_manifest(go(arms)[0]).identity
    again = load(CompareConfig, {"output_dir": str(tmp_path / "again"), "selections": str(arms)})
    assert read_manifest(compare.run(again)).identity == first


def test_verdicts_where_models_were_fine_tuned(arms: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(40) * 20 + 20
    runs = []
    for arm, gain in (("selected", 2.0), ("random", 0.0), ("kmeans+drop-0.5", 2.0)):
        for seed in range(3):
            folder = tmp_path / "evaluate" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            values = difficulty - gain + rng.normal(size=40) * 0.1
            results = [Result("holdout", "d", str(i), float(v), 20.0) for i, v in enumerate(values)]
            write_results(folder / RESULTS, results)
            write_manifest(
                folder,
                stage="evaluate",
                version=1,
                config={"identity": {"arm": arm, "seed": seed}, "execution": {}},
                inputs={},
                rows={"in": 0, "out": 0, "dropped": {}},
                environment={},
                created="",
            )
            runs.append(str(folder))
    out, found = go(arms, evaluations=runs)
    assert found["verdict"]["verdict"] == "beats_random"
    assert {arm["name"]: arm["verdict"] for arm in found["verdict"]["arms"]}["kmeans+drop-0.5"] == "beats_random"
    assert "beats_random" in (out / "summary.md").read_text()


def test_one_selection_is_nothing_to_compare(arms: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 1 selections"):
        compare.run(load(CompareConfig, {"output_dir": str(tmp_path / "o"), "selections": str(arms / "selected")}))
    assert not (tmp_path / "o").exists()
