"""The predecessor's stage 2 as it is typed: `pytest tests/warmup/test_stage_2_script.py`"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from selectmoe import route, warmup
from selectmoe.cli import main
from selectmoe.config import load
from selectmoe.finetune import rows_path
from selectmoe.manifest import find_manifests, identity_of, read_manifest
from selectmoe.router_data import read_router_data
from selectmoe.scores import score
from selectmoe.selection import read_selected

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def judge(small_judge: Any, small_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An applied judge and what stage 1 made of it."""
    path = small_judge("applied")
    training = {"recipe": "legacy", "training.epochs": 1, "training.rows": 8, "training.batch_size": 4, "threads": 1}
    paths = {"data": str(small_pool), "output_dir": str(tmp_path_factory.mktemp("stage_1") / "out")}
    out = warmup.run(load(warmup.WarmupConfig, {}, **training, **paths, **{"selector_model.path": path}))
    return {"selector_model.path": path, "model_checkpoint_path": str(out / "full_rank_weights.pt")}


def stage_2(folder: Path, keys: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "run_stage_2.sh"), *(f"{k}={v}" for k, v in keys.items()), *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(
    judge: dict[str, str], small_pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("stage_2")
    words = [f"dataset.local.data_dir={small_pool.parent / 'data'}", "dataset.local.dataset_names=[a,b]"]
    words += ["clustering_method=kmeans", "clustering_params.k=4", "clustering_params.auto_k=false", "debug_print=true"]
    return folder, stage_2(folder, judge, *words, "selection_percentage=0.2", "threads=1", "max_length=64")


def test_results_lie_where_the_seed_says(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = done
    assert process.returncode == 0, process.stderr
    out = folder / process.stdout.splitlines()[-1]
    assert re.fullmatch(r"outputs/stage_2_selection/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(out.relative_to(folder)))
    names = {path.name for path in (out / "router_data").iterdir()}
    assert names == {"a", "b", "a_router_data.pt", "b_router_data.pt"}
    saved = torch.load(out / "router_data" / "a_router_data.pt", weights_only=True)
    assert saved["quality_score"].shape == (20, 2, 1)
    chosen = read_selected(rows_path(str(out / "selected_data.jsonl"), "selected", 42))
    assert len(chosen) == 8
    assert (out / ".hydra" / "overrides.yaml").is_file()
    log = (out / "logs" / "stage_2.log").read_text()
    assert "selectmoe.cli route" in log
    assert "selectmoe.cli select" in log
    assert "selectmoe: " not in process.stderr
    assert "recipe=observer picking=coverage" in process.stderr


def test_spec7_18_what_was_done_is_what_the_words_say(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = done
    out = folder / process.stdout.splitlines()[-1]
    routed, selected = read_manifest(out), read_manifest(out / "selection")
    assert routed.stage == "route"
    assert routed.config["identity"]["export_legacy"] is True
    assert routed.config["identity"]["max_length"] == 64
    assert routed.rows == {"in": 40, "out": 40, "dropped": {}}
    made = selected.config["identity"]
    assert (made["method"], made["score"], made["picking"]) == ("kmeans", "legacy", "legacy")
    assert made["clustering_params"]["k"] == 4
    assert selected.inputs["router_data"]["identity"] == routed.identity
    assert {manifest.stage for _, manifest in find_manifests(out)} == {"route", "select"}
    summary = yaml.safe_load((out / "selection" / "selection_config.yaml").read_text())
    assert summary["clustering_parameters"]["k"] == 4
    assert "total_samples: 40" in process.stderr  # debug_print
    data = read_router_data(out)
    legacy = dict(zip(data.keys, score(data, "legacy").tolist()))
    for row in read_selected(out / "selected_data.jsonl"):
        assert row.scores["legacy"] == legacy[row.row.key]


def test_what_was_routed_can_be_inspected(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = done
    out = folder / process.stdout.splitlines()[-1]
    assert main(["inspect", str(out / "router_data")]) == 0
    numbers = json.loads((out / "inspect" / "inspect.json").read_text())
    assert numbers["work"]["units"] == numbers["work"]["plan"]["batches"] > 0
    assert 0 <= numbers["work"]["plan"]["padding"] <= 0.02
    assert 0 < numbers["sources"]["a"]["tokens"]["median"] <= 64
    assert {path.stem for path in (out / "inspect").glob("*.png")} >= {"gates", "experts", "work", "lengths"}
    files = [str(out / "router_data" / f"{name}_router_data.pt") for name in ("a", "b")]
    assert main(["inspect", *files, f"output_dir={folder / 'inspect-old'}"]) == 0
    old = json.loads((folder / "inspect-old" / "inspect.json").read_text())
    assert old["use"] == numbers["use"]
    assert old["scores"]["legacy"] == numbers["scores"]["legacy"]
    read_manifest(out)


def test_another_selection_from_what_was_routed(
    done: tuple[Path, subprocess.CompletedProcess[str]], judge: dict[str, str], small_pool: Path
) -> None:
    """As route's own command has it, dataset.* in place of data=."""
    folder, process = done
    out = folder / process.stdout.splitlines()[-1]
    datasets = {"dataset": {"local": {"data_dir": str(small_pool.parent / "data"), "dataset_names": ["a", "b"]}}}
    values = {"max_length": 64, "threads": 1, "export_legacy": True, **datasets}
    config = load(route.RouteConfig, values, output_dir=str(folder / "route"), **judge)
    parts = [folder / name for name in ("route", str(out.relative_to(folder)))]
    route.run(config)
    for name in ("a", "b"):
        assert len({identity_of(part / "router_data" / name) for part in parts}) == 1
    assert not (folder / "route" / ".work").exists()


def test_a_tag_names_the_folder_and_selection_can_be_left_out(
    judge: dict[str, str], small_pool: Path, tmp_path: Path
) -> None:
    words = [f"data={small_pool}", "tag=x", "skip_data_selection=true", "max_length=64", "threads=1"]
    process = stage_2(tmp_path, judge, *words)
    assert process.returncode == 0, process.stderr
    out = tmp_path / process.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d\d-\d\d-\d\d-tag-x", out.name)
    assert not (out / "selected_data.jsonl").exists()
    assert not (out / "selection").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"]["out"] == 36


def test_a_command_that_was_killed_or_is_given_again_goes_on(
    judge: dict[str, str], small_pool: Path, tmp_path: Path
) -> None:
    words = [f"data={small_pool}", "output_dir=out", "max_length=64", "threads=1", "selection_rows=5"]
    words += ["clustering_params.k=3"]
    assert stage_2(tmp_path, judge, *words, "skip_data_selection=false").returncode == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    (tmp_path / "out" / "selected_data.jsonl").unlink()
    process = stage_2(tmp_path, judge, *words)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert len(read_selected(tmp_path / "out" / "selected_data.jsonl")) == 5
