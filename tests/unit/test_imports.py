"""The direction of imports (docs/design.md): pytest tests/unit/test_imports.py"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_selectmoe_knows_nothing_above_it_and_mlflow_in_one_module():
    knows_mlflow = set()
    for path in (ROOT / "selectmoe").rglob("*.py"):
        found = imported(path)
        assert not found & {"kfp", "kubernetes", "kfp_server_api", "components", "pipelines"}, path
        if "mlflow" in found:
            knows_mlflow.add(path.name)
    assert knows_mlflow == {"tracking.py"}


def test_components_know_no_pipeline_and_import_little():
    for path in (ROOT / "components").rglob("*.py"):
        assert "pipelines" not in imported(path), path
        if path.name == "component.py":
            assert imported(path, top_only=True) <= set(sys.stdlib_module_names) | {"kfp"}, path


@pytest.mark.parametrize("stage", ["run", "report", "route", "merge", "select", "inspect", "finetune", "warmup"])
def test_configurations_need_no_heavy_import(stage):
    code = (
        f"import selectmoe.{stage}, sys; "
        "print([m for m in ('torch','transformers','peft','mlflow','kfp','lm_eval','matplotlib','sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
