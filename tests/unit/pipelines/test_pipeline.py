"""The compiled pipelines: `pytest tests/unit/pipelines/test_pipeline.py`; stale files: `python -m pipelines compile`."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import _plan
from pipelines.__main__ import PIPELINES, ROOT, compile_all, validate
from pipelines.profile import ACCELERATED
from pipelines.profile import STAGES as PLACED
from pipelines.select_moe.pipeline import COMPONENTS as WHOLE
from pipelines.select_moe.pipeline import STAGES
from pipelines.sweep.pipeline import COMPONENTS as SWEEP

COMPONENTS = tuple({item.name: item for item in (*WHOLE, *SWEEP)}.values())
NEVER_CACHED = {"check", "prepare", "finish"}


def committed(name: str) -> Path:
    return ROOT / "pipelines" / name / "pipeline.yaml"


@pytest.fixture(scope="module", params=PIPELINES)
def spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    return next(iter(yaml.safe_load_all(committed(request.param).read_text(encoding="utf-8"))))


def test_what_is_committed_is_what_the_source_gives(tmp_path: Path) -> None:
    for made in compile_all(tmp_path):
        golden = ROOT / made.relative_to(tmp_path)
        assert golden.read_bytes() == made.read_bytes(), f"{golden} is stale: python -m pipelines compile"


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_file_is_what_kfp_and_its_kubernetes_platform_understand(name: str, tmp_path: Path) -> None:
    from google.protobuf.json_format import ParseError

    validate(committed(name))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(committed(name).read_text(encoding="utf-8").replace("imagePullPolicy:", "imagePullPolizei:"))
    with pytest.raises(ParseError, match="imagePullPolizei"):
        validate(wrong)


def test_at_most_fifteen_parameters_all_documented(spec: dict[str, Any]) -> None:
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 15
    assert all(entry.get("description") for entry in parameters.values())


def test_only_check_and_finish_are_never_cached(spec: dict[str, Any]) -> None:
    uncached = {name for name, task in tasks(spec) if not task.get("cachingOptions", {}).get("enableCache")}
    assert uncached < NEVER_CACHED
    assert len(uncached) == 2


def test_every_task_that_is_cached_knows_the_code_that_it_runs(spec: dict[str, Any]) -> None:
    for name, task in tasks(spec):
        if name not in NEVER_CACHED:
            assert "code" in task["inputs"]["parameters"], name


def test_nothing_is_installed_at_run_time(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_every_parameter_that_a_task_takes_reaches_it(spec: dict[str, Any]) -> None:
    """KFP's compiler lets a resource setting name a parameter that its loop or condition was never handed."""
    for dag in ({"dag": spec["root"]["dag"]} | spec["root"], *spec["components"].values()):
        have = {*dag.get("inputDefinitions", {}).get("parameters", {})}
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            for given in task.get("inputs", {}).get("parameters", {}).values():
                wanted = given.get("componentInputParameter")
                items = task.get("parameterIterator", {}).get("itemInput")
                assert wanted is None or wanted in have or wanted == items, f"{name} is not handed {wanted}"


def test_tasks_that_use_an_accelerator_ask_for_it_and_no_others(spec: dict[str, Any]) -> None:
    for label, executor in spec["deploymentSpec"]["executors"].items():
        name = label.removeprefix("exec-").rstrip("-0123456789")
        asked = executor["container"]["resources"]
        assert ("accelerator" in asked) == (name in ACCELERATED), name
        assert {"resourceCpuRequest", "resourceMemoryLimit"} <= {*asked}, name


def test_the_reason_of_a_failure_can_be_told(spec: dict[str, Any]) -> None:
    task = spec["root"]["dag"]["tasks"]["finish"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in task["inputs"]["parameters"]["status"]


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
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    body = [
        node for node in function.body if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant)
    ]
    assert sum(node.end_lineno - node.lineno + 1 for node in body if node.end_lineno) <= 15


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function that takes parameters of a pipeline or of a component."""
    for path in [*ROOT.glob("components/*/component.py"), *ROOT.glob("pipelines/*/pipeline.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in ("__init__",):
                yield f"{path.parent.name}.{node.name}", node


def test_every_parameter_is_read() -> None:
    for name, function in functions():
        arguments = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} - {"self"}
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert arguments <= read, f"{name} takes {sorted(arguments - read)} and does not read it"


def test_every_parameter_is_documented() -> None:
    from docstring_parser import parse

    for name, function in functions():
        component = name.partition(".")[0] == function.name
        if component or function.name == f"_{name.partition('.')[0]}":
            documented = {p.arg_name for p in parse(ast.get_docstring(function) or "").params if p.description}
            arguments = {a.arg for a in function.args.args} - {"self"}
            assert arguments == documented, name


def test_a_parameter_that_is_not_read_is_found() -> None:
    function = ast.parse("def f(a, b):\n    b = 1\n    return a").body[0]
    read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert read == {"a"}


def test_check_hands_on_a_configuration_for_every_stage() -> None:
    assert _plan.STAGES == STAGES
    outputs = [*COMPONENTS[0].component_spec.outputs]
    assert outputs[1 : len(STAGES) + 1] == [*STAGES]


def test_every_component_has_its_place_in_a_profile() -> None:
    assert {str(item.name) for item in COMPONENTS} <= {*PLACED}


def tasks(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The tasks that execute something, wherever they stand."""
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    found = [task for dag in dags for task in dag["tasks"].items()]
    return [(n, t) for n, t in found if "executorLabel" in spec["components"][t["componentRef"]["name"]]]
