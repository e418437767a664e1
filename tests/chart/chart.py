"""The chart, rendered by the real helm, once for each combination of values. No command; the tests here use it.

`helm install --dry-run=client` asks no cluster, and gives manifests, hooks and notes in one go.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from manifests import Doc, parse

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm" / "select-moe"
BIN = ROOT / ".venv" / "bin"
HELM, KUBECTL = str(BIN / "helm"), str(BIN / "kubectl")
COMBINATIONS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "combinations.yaml").read_text())
RELEASE, NAMESPACE = "demo", "research"


@dataclass(frozen=True)
class Rendering:
    """What one combination gives."""

    name: str
    release: str
    namespace: str
    docs: list[Doc]
    """Manifests and hooks."""
    text: str
    notes: str
    values: dict[str, Any]
    """Everything that it was rendered with, the chart's defaults included."""


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run helm or kubectl; its output is text."""
    environment = os.environ | {"GOGC": "off"}  # a quarter of the time of a program that ends at once
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done


@contextmanager
def values_file(values: dict[str, Any]) -> Iterator[str]:
    """A file with these values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file, sort_keys=False)
        file.flush()
        yield file.name


def files(combination: dict[str, Any]) -> list[str]:
    """The options that name a combination's files."""
    return [word for name in combination.get("files", []) for word in ("--values", str(CHART / name))]


@functools.cache
def defaults() -> dict[str, Any]:
    """The chart's values.yaml."""
    given: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return given


def merged(below: Any, above: Any) -> Any:
    """Values over values, as helm lays them: mappings together, everything else replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {key: merged(below[key], above[key]) for key in below if key in above}
        return {**below, **above, **both}
    return above


def install(release: str, namespace: str, options: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """What an install would do, as JSON."""
    words = [HELM, "install", release, str(CHART), "--namespace", namespace, "--dry-run=client", "-o", "json"]
    return run(*words, *options, check=check)


def as_text(release: dict[str, Any]) -> str:
    """Manifests and hooks of a release as one stream, with the template of each as helm template writes it."""
    hooks = [f"# Source: {hook['path']}\n{hook['manifest']}\n" for hook in release.get("hooks", [])]
    return "---\n".join([release["manifest"].lstrip("-\n"), *hooks])


@functools.cache
def render(name: str) -> Rendering:
    """A combination's rendering, made once in a process."""
    combination = COMBINATIONS[name]
    release, namespace = combination.get("release", RELEASE), combination.get("namespace", NAMESPACE)
    with values_file(combination.get("values", {})) as above:
        done = json.loads(install(release, namespace, [*files(combination), "--values", above]).stdout)
    text = as_text(done)
    values = defaults()
    for file in combination.get("files", []):
        values = merged(values, yaml.safe_load((CHART / file).read_text(encoding="utf-8")))
    values = merged(values, combination.get("values", {}))
    return Rendering(name, release, namespace, parse(text), text, done["info"].get("notes", ""), values)


def install_with(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """What an install with some values over the defaults says."""
    with values_file(values) as above:
        return install(RELEASE, NAMESPACE, ["--values", above], check=False)


def changed(values: dict[str, Any]) -> list[Doc]:
    """The documents for some values over the defaults."""
    done = install_with(values)
    assert done.returncode == 0, done.stderr
    return parse(as_text(json.loads(done.stdout)))
