"""selectmoe/tracking.py against MLflow's own SQLite store: `pytest tests/unit/test_tracking.py`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selectmoe import stage, tracking
from selectmoe.config import StageConfig, identity
from selectmoe.errors import UserError


@dataclass
class ToyConfig(StageConfig):
    """A stage's configuration."""

    arm: str = identity("random", doc="an arm")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database: made once, since that takes seconds, and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    shutil.copyfile(database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "SELECTMOE_PARENT_RUN"):
        monkeypatch.delenv(name, raising=False)
    return tracking._client()


def output(path: Path, name: str, seed: int = 1, files: dict[str, str] | None = None) -> Path:
    config = ToyConfig(output_dir=str(path), seed=seed)
    with stage.begin(name, 1, config) as out:
        for file, text in (files or {"result.jsonl": "{}\n"}).items():
            (out.staging / file).parent.mkdir(parents=True, exist_ok=True)
            (out.staging / file).write_text(text)
        out.metric("loss", 2.0, step=1)
        out.metric("loss", 1.0, step=2)
        out.commit(rows_in=3, rows_out=2, dropped={"empty": 1})
    return path


def artifacts(client: Any, run_id: str) -> set[str]:
    return set(tracking._listed(client, run_id, ""))


def test_a_stage_becomes_a_nested_run(mlflow: Any, tmp_path: Path) -> None:
    client, _ = mlflow
    parent = tracking.start_parent("quick", {"preset": "quick", "nested": {"n": 3}})
    run_id = tracking.publish(output(tmp_path / "a", "select"), parent)
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["select_moe.stage"] == "select"
    assert len(run.data.tags["select_moe.identity"]) == 64
    assert run.info.run_name == "select random:1"
    assert run.data.params["arm"] == "random"
    assert run.data.metrics["stage/rows_out"] == 2
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert artifacts(client, run_id) == {"manifest.json", "metrics.jsonl", "result.jsonl"}
    assert client.get_run(parent).data.params == {"preset": "quick", "nested.n": "3"}
    assert parent in tracking.finish_parent(parent, tags={"verdict": "no_evidence"})
    assert client.get_run(parent).data.tags["select_moe.verdict"] == "no_evidence"


def test_the_same_output_is_sent_once(mlflow: Any, tmp_path: Path) -> None:
    client, _ = mlflow
    parent = tracking.start_parent("quick", {}, key="k")
    assert tracking.start_parent("quick", {}, key="k") == parent
    first = tracking.publish(output(tmp_path / "a", "select"), parent)
    assert tracking.publish(output(tmp_path / "b", "select"), parent) == first
    assert tracking.publish(output(tmp_path / "c", "select", seed=2), parent) != first
    other = tracking.publish(tmp_path / "a", tracking.start_parent("quick", {}))
    assert other != first
    assert client.get_run(other).data.tags["select_moe.artifacts_in"] == first
    assert artifacts(client, other) == set()


def test_checkpoints_go_by_reference(mlflow: Any, tmp_path: Path) -> None:
    client, _ = mlflow
    path = output(tmp_path / "a", "convert", files={"model.safetensors": "x"})
    run_id = tracking.publish(path)
    assert artifacts(client, str(run_id)) == {"manifest.json"}
    assert json.loads(client.get_run(run_id).data.tags["select_moe.checkpoint"])["uri"] == str(path)


def test_router_data_is_uploaded_merged_and_not_by_shard(mlflow: Any, tmp_path: Path) -> None:
    client, _ = mlflow
    shard = tracking.publish(output(tmp_path / "a", "route-shard-0-of-2"))
    merged = tracking.publish(output(tmp_path / "b", "route"))
    assert artifacts(client, str(shard)) == {"manifest.json"}
    assert "result.jsonl" in artifacts(client, str(merged))


def test_adapters_without_the_trainers_checkpoints(mlflow: Any, tmp_path: Path) -> None:
    client, _ = mlflow
    files = {"adapter_model.safetensors": "x", "adapter_config.json": "{}", "checkpoint-4/optimizer.pt": "x"}
    run_id = tracking.publish(output(tmp_path / "a", "finetune", files=files))
    wanted = {"manifest.json", "metrics.jsonl", "adapter_model.safetensors", "adapter_config.json"}
    assert artifacts(client, str(run_id)) == wanted


def test_a_run_that_kfp_opened_is_adopted(mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, experiment = mlflow
    opened = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    assert tracking.publish(output(tmp_path / "a", "select")) == opened
    assert client.get_run(opened).info.status == "RUNNING"


def test_without_mlflow_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.publish(output(tmp_path / "a", "select")) is None
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        tracking.sync(str(tmp_path))


def test_a_task_may_leave_the_sending_to_another_process(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, experiment = mlflow
    path, root = output(tmp_path / "a", "select"), str(tmp_path / "work")
    parent = tracking.start_parent("quick", {})
    with monkeypatch.context() as task:
        task.setenv(tracking.DEFER, "1")
        task.setenv("SELECTMOE_PARENT_RUN", parent)
        tracking.submit(path, root)
    assert len(tracking._search(client, experiment, {"stage": "select"})) == 0
    assert tracking.sync(root) == 1
    (run,) = tracking._search(client, experiment, {"stage": "select"})
    assert run.data.tags["mlflow.parentRunId"] == parent


def test_mlflow_away_costs_no_work(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = output(tmp_path / "a", "select"), str(tmp_path / "work")
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert tracking.publish(path, "", journal=root) is None
        assert f"selectmoe sync {root}" in capsys.readouterr().err
        with pytest.raises(UserError, match="did not take"):
            tracking.sync(root)
    assert tracking.sync(root) == 1
    assert tracking.sync(root) == 0
