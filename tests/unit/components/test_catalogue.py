"""The layout that the kubeflow/pipelines-components catalogue asks for: pytest tests/unit/components/test_catalogue.py"""

from __future__ import annotations

import re
import tomllib
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

from components import _plan

ROOT = Path(__file__).parents[3]
COMPONENTS = sorted(path.parent for path in ROOT.glob("components/*/component.py"))
PIPELINES = sorted(path.parent for path in ROOT.glob("pipelines/*/pipeline.py"))
REQUIRED = ["name", "stability", "dependencies", "lastVerified"]
"""What metadata.yaml has to hold, in this order."""
OPTIONAL = {"tags", "ci", "links"}
VERSION = re.compile(r"(==|>=|<=)?\d+\.\d+\.\d+")


@pytest.mark.parametrize("folder", [*COMPONENTS, *PIPELINES], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_files_of_a_component_or_pipeline(folder: Path) -> None:
    assert {"__init__.py", "README.md", "OWNERS", "metadata.yaml"} <= {path.name for path in folder.iterdir()}
    owners = yaml.safe_load((folder / "OWNERS").read_text(encoding="utf-8"))
    assert set(owners) == {"approvers", "reviewers"}
    assert all(names and all(isinstance(name, str) for name in names) for names in owners.values())
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    assert [key for key in metadata if key not in OPTIONAL] == REQUIRED
    assert metadata["name"] == folder.name
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")
    assert isinstance(metadata["lastVerified"], datetime)
    assert set(metadata["dependencies"]) <= {"kubeflow", "external_services"}
    needs = [entry for entries in metadata["dependencies"].values() for entry in entries]
    assert "Pipelines" in {entry["name"] for entry in metadata["dependencies"]["kubeflow"]}
    assert all(VERSION.fullmatch(entry["version"]) for entry in needs)
    assert set(metadata["ci"]) == {"skip_dependency_probe"}


@pytest.mark.parametrize("folder", COMPONENTS, ids=lambda path: path.name)
def test_every_component_is_tried_in_process_and_with_the_local_runner(folder: Path) -> None:
    for kind, call in (("unit", "in_process"), ("local", "(locally|execute)")):
        text = (folder / "tests" / f"test_component_{kind}.py").read_text(encoding="utf-8")
        assert f"from components.{folder.name}.component import {folder.name}\n" in text
        assert re.search(rf"alone\.{call}\(", text)


def test_tests_are_neither_in_the_image_nor_in_the_codes_digest() -> None:
    assert "**/tests" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert "components.merge" in packages
    assert not [name for name in packages if "tests" in name.split(".")]
    hashed = {path.name for path in _plan.HERE.glob("*.py")}
    assert not [name for name in hashed if name.startswith(("test", "conftest"))]


def test_the_docs_list_every_component_in_its_own_words() -> None:
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\(\.\./components/(\w+)/README\.md\) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert {name for name, _, _, _ in listed} == {folder.name for folder in COMPONENTS}
    for name, folder, what, used in listed:
        readme = (ROOT / "components" / folder / "README.md").read_text(encoding="utf-8")
        assert name == folder
        assert f"\n{what}\n" in readme, name
        for pipeline in PIPELINES:
            imported = f"from components.{name}.component import" in (pipeline / "pipeline.py").read_text("utf-8")
            assert imported == (pipeline.name in used.split(", ")), f"{name}: {pipeline.name}"
