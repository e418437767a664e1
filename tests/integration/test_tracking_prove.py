"""tracking.prove against a real MLflow server: `pytest tests/integration/test_tracking_prove.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import MlflowServer, Proxy, free_port

from selectmoe import tracking
from selectmoe.errors import UserError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    made = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


def refusal(uri: str, seconds: float = 1.0) -> str:
    with pytest.raises(UserError) as caught:
        tracking.prove(uri, seconds=seconds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_mlflow_that_works(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking.prove(server.url, "trials")
    from mlflow import MlflowClient

    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("trials")
    assert client.search_runs([experiment.experiment_id]) == [], "the proof's run is deleted"


def test_nobody_answers() -> None:
    assert "cannot be reached" in refusal(f"http://127.0.0.1:{free_port()}")


def test_credentials_are_missing(proxy: Proxy) -> None:
    proxy.status, proxy.body = 401, "You are not authenticated."
    assert "MLFLOW_TRACKING_USERNAME" in refusal(proxy.url, 20)
    proxy.status, proxy.body = 403, "Permission denied"
    assert "refuses us (403)" in refusal(proxy.url, 20)
    assert proxy.refused == 2, "a refusal is not tried again"


def test_an_mlflow_that_does_not_know_its_name(server: MlflowServer) -> None:
    uri = server.url.replace("127.0.0.1", "0x7f.1")
    assert "--allowed-hosts 0x7f.1:" in refusal(uri, 20)


def test_errors_are_tried_again(proxy: Proxy) -> None:
    proxy.status = 500
    assert "answers with errors" in refusal(proxy.url, 3)
    assert proxy.refused > 1


def test_the_artifact_store_is_broken(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    made = MlflowServer(tmp_path, artifacts=str(blocked / "artifacts"))
    made.start()
    try:
        assert "artifact store" in refusal(made.url, 5)
    finally:
        made.kill()
