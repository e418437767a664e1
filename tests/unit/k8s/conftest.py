"""What the tests of k8s/ share: stand-ins for the programs, and a cluster's state that a test can look at and change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from k8s import kind, place
from tests.unit.k8s import stand_in
from tests.unit.k8s.world import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Docker, kind, kubectl, helm and git on PATH; a chart; a demo that was made; nothing listening on the ports."""
    found = World(tmp_path)
    stand_in.install(found.bin, "docker", "kind", "kubectl", "helm", "git")
    for name in ("CONTAINER_ENGINE", "KIND_EXPERIMENTAL_PROVIDER", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KF_PIPELINES_UI_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "set by the command")  # so that they are what they were when the test is over
    for name in ("sh", "env", "bash", "python3"):  # nothing else of this machine, which may have a docker of its own
        (found.bin / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(found.bin))
    monkeypatch.setenv("STAND_IN", str(found.file))
    monkeypatch.setenv("SELECTMOE_STATE", str(found.state))
    chart = tmp_path / "chart"
    chart.mkdir()
    (chart / "values-kind.yaml").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(kind, "CHART", chart)
    monkeypatch.setattr(place.Place, "check_ports", lambda self: None)
    monkeypatch.setattr(place, "answers", lambda url, seconds: None)
    for part in ("quick/data", "quick/model", "tiny/data"):
        (found.state / "demo" / part).mkdir(parents=True)
        (found.state / "demo" / part / "file").write_text(part, encoding="utf-8")
    return found
