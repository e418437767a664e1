"""What the tests of the chart's commands share: no waiting, and the stand-in for Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.install import patience
from tests.kubernetes_server import KubernetesServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST", 0.01)
    monkeypatch.setattr(patience, "LONGEST", 0.05)
    monkeypatch.setattr(patience, "UNSETTLED_SECONDS", 0.3)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    server = KubernetesServer()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", server.kubeconfig(tmp_path))
    yield server
    server.close()
