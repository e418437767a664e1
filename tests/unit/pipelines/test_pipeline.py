"""The compiled pipeline: `pytest tests/unit/pipelines/test_pipeline.py`; stale files: `python -m pipelines compile`."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.__main__ import ROOT, TARGET, compile_all
from pipelines.select_moe.pipeline import COMPONENTS, STAGES


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / TARGET).read_text(encoding="utf-8")))


def test_what_is_committed_is_what_the_source_gives(tmp_path: Path) -> None:
    for made in compile_all(tmp_path):
        committed = ROOT / made.relative_to(tmp_path)
        assert committed.read_bytes() == made.read_bytes(), f"{committed} is stale: python -m pipelines compile"


def test_at_most_fifteen_parameters(spec: dict[str, Any]) -> None:
    assert len(spec["root"]["inputDefinitions"]["parameters"]) <= 15


def test_only_check_is_never_cached(spec: dict[str, Any]) -> None:
    tasks = [task for dag in dags(spec) for task in dag["tasks"].items()]
    leaves = [(name, task) for name, task in tasks if "executorLabel" in component(spec, task)]
    uncached = {name for name, task in leaves if not task.get("cachingOptions", {}).get("enableCache")}
    assert uncached == {"check"}
    assert len(leaves) == len(COMPONENTS) + 1  # evaluate twice: the base model, and every arm


def test_every_task_knows_the_code_that_it_runs(spec: dict[str, Any]) -> None:
    for item in spec["components"].values():
        if "executorLabel" in item and "checked" not in item["outputDefinitions"].get("artifacts", {}):
            assert "code" in item["inputDefinitions"]["parameters"]


def test_nothing_is_installed_at_run_time(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


@pytest.mark.parametrize("item", COMPONENTS, ids=lambda item: str(item.name))
def test_a_component_is_a_thin_shell(item: Any) -> None:
    path = Path(inspect.getfile(item.python_func))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"kfp", *sys.stdlib_module_names}
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed
    metadata = yaml.safe_load((path.parent / "metadata.yaml").read_text(encoding="utf-8"))
    assert metadata["name"] == path.parent.name == item.name


def test_check_hands_on_a_configuration_for_every_stage() -> None:
    from components import _shell

    assert _shell.STAGES == STAGES
    outputs = [*COMPONENTS[0].component_spec.outputs]
    assert outputs[1 : len(STAGES) + 1] == [*STAGES]


def dags(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]


def component(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    return dict(spec["components"][task["componentRef"]["name"]])
