"""What the pages say of helm and kubectl, with the real programs: `pytest tests/chart/test_pages.py`.

Every `helm install` or `upgrade` of the chart is rendered with the values that it names; every object of the chart that a
`kubectl` command names is in a rendering; every value in a table or a sentence (`like.this`) is one of the chart's.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HELM = str(ROOT / ".venv" / "bin" / "helm")
CHART = ROOT / "helm" / "select-moe"
NAMES = ("install", "values", "upgrade", "security", "sizing", "troubleshooting")
PAGES = [ROOT / "README.md", CHART / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
BLOCK = re.compile(r"^```bash cluster\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{page.parent.name}/{page.name}-{block}-{n}")
    for page in PAGES
    for block, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
    for n, line in enumerate(text.strip().splitlines(), 1)
]
OWN_FILES = {"values-production.yaml": CHART / "values-production.yaml"}
"""Copies that a reader makes, and what they are copies of."""
INLINE = {
    "my-gpu-values.yaml": "accelerator_count",
    "run.yaml": "  run:",
    "servers-values.yaml": "# servers-values.yaml",
}
"""Files whose content stands below the command, and what it is found by."""


def render(*words: str) -> list[dict[str, Any]]:
    """The chart with some words of `helm template`."""
    done = subprocess.run([HELM, "template", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def snippet(mark: str) -> str:
    """A YAML block of the pages."""
    blocks = [block for page in PAGES for block in SNIPPET.findall(page.read_text(encoding="utf-8"))]
    (found,) = [block for block in blocks if mark in block]
    return str(found)


@functools.cache
def objects() -> frozenset[str]:
    """KIND/NAME of everything that a release `select-moe` may have, in small letters."""
    production = ("--values", str(CHART / "values-production.yaml"), "--set", f"image.digest=sha256:{'0' * 64}")
    sets = ((), ("--set", "pipeline.run.enabled=true", "--set", "mlflow.auth.enabled=true"), production)
    documents = [d for words in sets for d in render("select-moe", str(CHART), "--namespace", "kubeflow", *words)]
    found = {f"{d['kind']}/{d['metadata']['name']}".lower() for d in documents}
    specs = [d["data"]["secrets.yaml"] for d in documents if "secrets.yaml" in d.get("data", {})]
    found |= {f"secret/{secret['name']}" for spec in specs for secret in yaml.safe_load(spec)["secrets"]}
    return frozenset(found)


@pytest.mark.parametrize("words", COMMANDS)
def test_command(words: list[str], tmp_path: Path) -> None:
    if words[:1] == ["helm"] and "helm/select-moe" in words:
        given = [word for word in words[2:] if word not in ("--install", "--reset-then-reuse-values")]
        for name in [word for word in given if word.endswith(".yaml") and not word.startswith("helm/")]:
            path = OWN_FILES.get(name, tmp_path / name)
            if name in INLINE:
                path.write_text(snippet(INLINE[name]), encoding="utf-8")
            given[given.index(name)] = str(path)
        if str(OWN_FILES["values-production.yaml"]) in given:
            given += ["--set", f"image.digest=sha256:{'0' * 64}"]  # what `make images-lock` has written there
        if words[1] in ("upgrade", "install", "template"):
            assert render(*given)
    elif words[:1] == ["kubectl"]:
        for word in words:
            kind, slash, name = word.partition("/")
            if slash and name.startswith("select-moe-"):
                assert f"{kind.removesuffix('s')}/{name}" in objects(), word
        if "secret" in words and "get" in words:
            assert f"secret/{words[words.index('secret') + 1]}" in objects()


def test_containers_and_files_that_commands_name() -> None:
    (mlflow,) = [d for d in render("select-moe", str(CHART), "--namespace", "kubeflow") if d["kind"] == "Deployment"]
    pod = mlflow["spec"]["template"]["spec"]
    names = {c["name"] for c in [*pod["containers"], *pod["initContainers"]]}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"--container (\w+)", text)) <= names
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert env["MLFLOW_BACKEND_STORE_URI"] == "sqlite:////data/mlflow.db"


def leaves(values: Any, path: str = "") -> set[str]:
    found = {path} if path else set()
    if isinstance(values, dict):
        for key, value in values.items():
            found |= leaves(value, f"{path}.{key}" if path else key)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_values_that_are_named_exist(page: Path) -> None:
    known = leaves(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    tops = {name.partition(".")[0] for name in known}
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for word in re.findall(r"`([A-Za-z]+(?:\.[A-Za-z_]+)+)(?:[=:][^`]*)?`", text):
        if word.partition(".")[0] in tops and not word.endswith((".md", ".yaml")):
            free = any(
                word.startswith(f"{name}.") for name in known if name.startswith("pipeline.") and "profile" in name
            )
            assert word in known or free, f"{page.name}: {word}"
