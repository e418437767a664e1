"""checkov, offline, over several renderings: what it finds is in checkov.yaml with a reason, and nothing is there for nothing.

.venv/bin/python -m pytest tests/chart/test_checkov.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import COMBINATIONS, ROOT, render
from manifests import pods

SKIPS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "checkov.yaml").read_text(encoding="utf-8")) or {}
NAMES = ["defaults", "production", "ingress-tls", "run-at-install"]
"""Between them they have every template that starts a pod (a test says so)."""


@pytest.fixture(scope="session")
def findings(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str, str]]:
    """(check, what it is about, object) of everything that failed."""
    folder = tmp_path_factory.mktemp("checkov")
    return check(folder, {name: render(name).text for name in NAMES})


def check(folder: Path, texts: dict[str, str]) -> set[tuple[str, str, str]]:
    """Run checkov over manifests."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    program = str(ROOT / ".venv" / "checkov" / "bin" / "checkov")
    words = ["-d", str(folder), "--framework", "kubernetes", "secrets", "--skip-download", "--quiet", "--compact"]
    environment = os.environ | {"LOG_LEVEL": "ERROR", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    done = subprocess.run([program, *words, "-o", "json"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (0, 1), done.stderr
    reports = json.loads(done.stdout)
    found = set()
    for report in reports if isinstance(reports, list) else [reports]:
        if "results" not in report:  # nothing of this framework was found at all
            continue
        assert not report["summary"]["parsing_errors"], report["results"]["parsing_errors"]
        for item in report["results"]["failed_checks"]:
            where = "a text" if item["check_id"].startswith("CKV_SECRET") else item["resource"]
            line = texts[Path(item["file_path"]).stem].splitlines()[item["file_line_range"][0] - 1].strip()
            place = f"{Path(item['file_path']).stem}: {where}" + (f": {line}" if where == "a text" else "")
            found.add((item["check_id"], item["check_name"], place))
    return found


def test_every_kind_of_pod_is_looked_at() -> None:
    def components(names: Iterable[str]) -> set[str]:
        return {pod.labels["app.kubernetes.io/component"] for name in names for pod in pods(render(name).docs)}

    assert components(NAMES) == components(COMBINATIONS)


def test_every_finding_is_explained(findings: set[tuple[str, str, str]]) -> None:
    unexplained = {
        (number, what, where)
        for number, what, where in findings
        if number not in SKIPS or not re.search(SKIPS[number].get("on", ""), where)
    }
    assert not unexplained


def test_no_explanation_is_left_over(findings: set[tuple[str, str, str]]) -> None:
    for number, skip in SKIPS.items():
        assert len(skip["why"]) > 20, f"{number}: say why"
        assert any(number == found and re.search(skip.get("on", ""), where) for found, _, where in findings), number


def test_checkov_does_find_something(tmp_path: Path) -> None:
    text = render("defaults").text.replace("allowPrivilegeEscalation: false", "privileged: true")
    assert {"CKV_K8S_16", "CKV_K8S_20"} <= {number for number, _, _ in check(tmp_path, {"bad": text})}
