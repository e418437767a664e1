"""`selectmoe.report_data`: finding the outputs of a run, and the numbers that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe import report_data
from selectmoe.errors import UserError
from selectmoe.evaluate import HOLDOUT, Result, write_results
from selectmoe.manifest import Manifest, read_manifest, write_manifest


def output(folder: Path, stage: str, execution: dict[str, Any] | None = None, **identity: Any) -> Path:
    """A finished output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.txt").write_text("data")
    write_manifest(
        folder,
        stage=stage,
        version=1,
        config={"identity": {"seed": 0} | identity, "execution": {"output_dir": str(folder)} | (execution or {})},
        inputs={},
        rows={"in": 0, "out": 0, "dropped": {}},
        environment={"seconds": 1.0, "peak_rss_bytes": 1},
        created="2020-01-01T00:00:00+00:00",
    )
    return folder


def evaluation(folder: Path, arm: str, seed: int, ids: str = "abc", value: float = 8.0) -> tuple[Path, Manifest]:
    """A finished evaluation on held-out rows."""
    folder.mkdir(parents=True)
    write_results(folder / "results.parquet", [Result(HOLDOUT, "source", i, value, 4.0) for i in ids])
    return output(folder, "evaluate", arm=arm, seed=seed), read_manifest(folder)


def test_find_takes_every_output_below_a_folder_once_and_leaves_reports_out(tmp_path: Path) -> None:
    one = output(tmp_path / "run" / "convert", "convert")
    output(tmp_path / "run" / "report", "report")
    found = report_data.find([str(tmp_path / "run"), str(one)])
    assert [path for path, _ in found] == [one]


@pytest.mark.parametrize("there", [True, False])
def test_find_names_the_folder_that_holds_nothing(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
    with pytest.raises(UserError, match="nothing"):
        report_data.find([str(folder)])


def test_evaluations_are_stacked_by_arm_and_seed(tmp_path: Path) -> None:
    found = [evaluation(tmp_path / f"{s}", "random", s, value=float(s)) for s in (2, 0, 1)]
    found.append(evaluation(tmp_path / "base", "base", 0, value=9.0))
    values, weights, strata, base = report_data.evaluations(found)
    assert values["random"][:, 0].tolist() == [0.0, 1.0, 2.0]
    assert (weights.tolist(), strata) == ([4.0] * 3, ["source"] * 3)
    assert base is not None
    assert base.tolist() == [9.0] * 3


def test_evaluations_on_other_examples_are_refused(tmp_path: Path) -> None:
    found = [evaluation(tmp_path / "a", "random", 0), evaluation(tmp_path / "b", "selected", 0, ids="abd")]
    with pytest.raises(UserError, match="other examples"):
        report_data.evaluations(found)


def test_evaluations_of_other_seeds_are_refused(tmp_path: Path) -> None:
    found = [evaluation(tmp_path / f"{a}{s}", a, s) for a, s in (("random", 0), ("random", 1), ("selected", 0))]
    with pytest.raises(UserError, match=r"arm selected has seeds \[0\], random has \[0, 1\]"):
        report_data.evaluations(found)


def test_two_evaluations_of_one_arm_and_seed_are_never_mixed(tmp_path: Path) -> None:
    one, same = (evaluation(tmp_path / name, "random", 0) for name in ("one", "same"))
    report_data.evaluations([one, same])  # the same result in two places
    other = evaluation(tmp_path / "other", "random", 0, value=7.0)
    with pytest.raises(UserError, match="two different evaluations of random, seed 0"):
        report_data.evaluations([one, other])


def test_summary_is_the_t_interval_over_seeds() -> None:
    whole = report_data.summary({"random": [1.0, 2.0, 3.0], "base": [4.0]})
    assert whole["base"] == {"mean": 4.0}
    assert whole["random"]["high"] - 2.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert whole["random"]["low"] + whole["random"]["high"] == pytest.approx(4.0)


def test_command_is_what_was_typed_quoted_for_a_shell(tmp_path: Path) -> None:
    path = output(
        tmp_path / "x", "ingest", {"data": "a b", "work_root": "w", "rest": "", "none": None}, kinds=["p", "q"]
    )
    given = report_data.command(read_manifest(path))
    assert given == f"selectmoe ingest 'kinds=[p,q]' seed=0 'data=a b' output_dir={path}"


def test_command_of_merged_router_data_is_merge_and_of_a_part_names_its_place(tmp_path: Path) -> None:
    merged = output(tmp_path / "merge", "route", {"shards": ["one", "two"]})
    assert report_data.command(read_manifest(merged)).startswith("selectmoe merge ")
    part = output(tmp_path / "random-0", "select", {"output_dir": "out/.work/staging/random-0"})
    assert "output_dir=out/random-0" in report_data.command(read_manifest(part))


def test_command_of_a_whole_run_stays_its_own(tmp_path: Path) -> None:
    path = output(tmp_path / "check", "check", {"shards": 2})
    assert report_data.command(read_manifest(path)).startswith("selectmoe check ")
