"""selectmoe/tracking.py and sending.py against MLflow's own SQLite store: `pytest tests/unit/test_tracking.py`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from s3_faults import Proxy

from selectmoe import cli, journal, sending, stage, tracking
from selectmoe.config import StageConfig, identity
from selectmoe.errors import Refused, UserError
from selectmoe.storage import open_store

RESULTS = {"verdict": {"verdict": "no_evidence", "metric": "holdout"}, "sentence": "No evidence."}


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


class Server:
    """An MLflow store, and a work root whose journal is sent to it."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "work")
        self.client, self.experiment = tracking._client()

    def run(self, **tags: str) -> Any:
        (found,) = tracking._search(self.client, self.experiment, tags)
        return found

    def send(self, output: Path, parent: str = "") -> Any:
        """Submit an output and send the journal; the run of the output."""
        sending.submit(output, self.root, parent)
        assert sending.sync(self.root) >= 1
        assert journal.names(self.root) == []
        key = stage.mf.read_manifest(output).key
        runs = tracking._search(self.client, self.experiment, {"work": key})
        return runs[0]

    def artifacts(self, run: Any) -> set[str]:
        return set(tracking._listed(self.client, run.info.run_id, ""))

    def points(self, run: Any, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name)]


@pytest.fixture
def mlflow(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    shutil.copyfile(database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "SELECTMOE_PARENT_RUN", "KFP_RUN_ID", sending.DEFER):
        monkeypatch.delenv(name, raising=False)
    return Server(tmp_path)


def output(path: Path, name: str, files: dict[str, str] | None = None, work_root: str = "", **fields: Any) -> Path:
    config = ToyConfig(output_dir=str(path), work_root=work_root, **fields)
    with stage.begin(name, 1, config) as out:
        for file, text in (files or {"result.jsonl": "{}\n"}).items():
            (out.staging / file).parent.mkdir(parents=True, exist_ok=True)
            (out.staging / file).write_text(text)
        out.metric("loss", 2.0, step=1)
        out.metric("loss", 1.0, step=2)
        out.commit(rows_in=3, rows_out=2, dropped={"empty": 1})
    return path


def test_a_stage_becomes_a_nested_run(mlflow: Server, tmp_path: Path) -> None:
    parent = sending.start_parent("quick", {"preset": "quick", "nested": {"n": 3}}, mlflow.root, key="k")
    run = mlflow.send(output(tmp_path / "a", "select"), parent)
    whole = mlflow.run(key="k")
    assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert run.data.tags["select_moe.stage"] == "select"
    assert len(run.data.tags["select_moe.identity"]) == 64
    assert run.info.run_name == "select random:42"
    assert run.info.status == "FINISHED"
    assert run.data.params["arm"] == "random"
    assert run.data.metrics["stage/rows_out"] == 2
    assert mlflow.points(run, "loss") == [(1, 2.0), (2, 1.0)]
    assert mlflow.artifacts(run) == {"manifest.json", "metrics.jsonl", "result.jsonl"}
    assert whole.data.params == {"preset": "quick", "nested.n": "3"}
    assert whole.info.status == "RUNNING"
    assert whole.info.run_id in tracking.address(parent)
    sending.finish_parent(parent, mlflow.root, tags={"verdict": "no_evidence"})
    sending.sync(mlflow.root)
    assert mlflow.run(key="k").data.tags["select_moe.verdict"] == "no_evidence"
    assert mlflow.run(key="k").info.status == "FINISHED"


def test_the_same_output_is_sent_once(mlflow: Server, tmp_path: Path) -> None:
    parent = sending.start_parent("quick", {}, mlflow.root, key="k")
    first = mlflow.send(output(tmp_path / "a", "select"), parent)
    assert mlflow.send(output(tmp_path / "b", "select"), parent).info.run_id == first.info.run_id
    assert mlflow.send(output(tmp_path / "c", "select", seed=2), parent).info.run_id != first.info.run_id
    mlflow.send(tmp_path / "a", sending.start_parent("quick", {}, mlflow.root))
    runs = tracking._search(mlflow.client, mlflow.experiment, {"identity": first.data.tags["select_moe.identity"]})
    assert len(runs) == 2
    (other,) = (run for run in runs if run.info.run_id != first.info.run_id)
    assert other.data.tags["select_moe.artifacts_in"] == first.info.run_id
    assert mlflow.artifacts(other) == set()


def test_a_stage_is_seen_while_it_runs_and_goes_on_in_its_run(mlflow: Server, tmp_path: Path) -> None:
    def numbers(out: stage.Output, first: int, last: int) -> None:
        for step in range(first, last):
            out.metric("loss", 1.0 / (step + 1), step=step)

    config = ToyConfig(output_dir=str(tmp_path / "a"), work_root=mlflow.root)
    with pytest.raises(RuntimeError, match="power"), stage.begin("warmup", 1, config) as out:
        numbers(out, 0, 20)
        sending.sync(mlflow.root)
        run = mlflow.run(stage="warmup")
        assert run.info.status == "RUNNING"
        assert len(mlflow.points(run, "loss")) == 20
        assert journal.names(mlflow.root), "its writer lives"
        numbers(out, 20, 30)
        raise RuntimeError("power")
    sending.sync(mlflow.root)
    failed = mlflow.run(stage="warmup")
    assert failed.info.status == "FAILED"
    assert failed.data.tags["select_moe.failure"] == "RuntimeError: power"
    assert any(name.startswith("system/cpu") for name in failed.data.metrics)
    with stage.begin("warmup", 1, config) as out:
        numbers(out, 10, 40)
        out.commit()
    again = mlflow.send(tmp_path / "a")
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert [step for step, _ in mlflow.points(again, "loss")] == list(range(40))


def test_a_stage_that_finishes_anothers_work_is_one_run(mlflow: Server, tmp_path: Path) -> None:
    config = ToyConfig(output_dir=str(tmp_path / "a"), work_root=mlflow.root)
    with stage.begin("merge", 1, config) as out:
        sending.sync(mlflow.root)
        out.stage = "route"
        out.commit()
    run = mlflow.send(tmp_path / "a")
    assert [r.info.run_id for r in mlflow.client.search_runs([mlflow.experiment])] == [run.info.run_id]
    assert run.data.tags["select_moe.stage"] == "route"
    assert run.info.status == "FINISHED"


def test_checkpoints_go_by_reference(mlflow: Server, tmp_path: Path) -> None:
    path = output(tmp_path / "a", "convert", files={"model.safetensors": "x"})
    run = mlflow.send(path)
    assert mlflow.artifacts(run) == {"manifest.json"}
    assert json.loads(run.data.tags["select_moe.checkpoint"])["uri"] == str(path)


def test_router_data_is_uploaded_merged_and_not_by_shard(mlflow: Server, tmp_path: Path) -> None:
    shard = mlflow.send(output(tmp_path / "a", "route-shard-0-of-2"))
    merged = mlflow.send(output(tmp_path / "b", "route"))
    assert mlflow.artifacts(shard) == {"manifest.json"}
    assert "result.jsonl" in mlflow.artifacts(merged)


def test_adapters_without_the_trainers_checkpoints(mlflow: Server, tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": "x", "adapter_config.json": "{}", "checkpoint-4/optimizer.pt": "x"}
    run = mlflow.send(output(tmp_path / "a", "finetune", files=files))
    wanted = {"manifest.json", "metrics.jsonl", "adapter_model.safetensors", "adapter_config.json"}
    assert mlflow.artifacts(run) == wanted


def test_a_run_that_kfp_opened_is_adopted(mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = mlflow.client.create_run(mlflow.experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    monkeypatch.setenv("SELECTMOE_IMAGE", "moe@sha256:1")
    monkeypatch.setenv("KFP_RUN_ID", "r-1")
    journal.context.cache_clear()
    run = mlflow.send(output(tmp_path / "a", "select", work_root=mlflow.root))
    assert run.info.run_id == opened
    assert run.info.status == "RUNNING", "KFP closes it"
    assert run.data.tags["select_moe.image"] == "moe@sha256:1"
    assert run.data.tags["select_moe.kfp_run_id"] == "r-1"
    assert len(mlflow.client.search_runs([mlflow.experiment])) == 1
    journal.context.cache_clear()


def test_datasets_are_named_with_digest_and_source(mlflow: Server, tmp_path: Path) -> None:
    pool = output(tmp_path / "pool", "ingest")
    config = ToyConfig(output_dir=str(tmp_path / "a"))
    with stage.begin("warmup", 1, config, inputs={"pool": str(pool)}) as out:
        out.commit()
    (entry,) = mlflow.send(tmp_path / "a").inputs.dataset_inputs
    identity_of_pool = stage.mf.read_manifest(pool).identity
    assert (entry.dataset.name, entry.dataset.digest) == ("pool", identity_of_pool[:36])
    assert json.loads(entry.dataset.source) == {"uri": str(pool), "identity": identity_of_pool}


def test_weights_are_registered_once_and_a_verdict_makes_a_champion(mlflow: Server, tmp_path: Path) -> None:
    first = mlflow.send(output(tmp_path / "a", "warmup", arm="selected"))
    mlflow.send(output(tmp_path / "b", "finetune", arm="random"))
    adapter = mlflow.send(output(tmp_path / "c", "finetune", arm="selected"))
    mlflow.send(tmp_path / "a", sending.start_parent("again", {}, mlflow.root))
    version = mlflow.client.get_model_version_by_alias("select-moe-router", "candidate")
    assert (str(version.version), version.run_id) == ("1", first.info.run_id)
    assert version.source == first.info.artifact_uri
    second = mlflow.send(output(tmp_path / "d", "warmup", arm="selected", seed=7))
    assert mlflow.client.get_model_version_by_alias("select-moe-router", "candidate").run_id == second.info.run_id

    def report(name: str, verdict: str) -> None:
        runs = [("warmup", "", first), ("finetune", "selected", adapter)]
        stages = [
            {"stage": s, "arm": arm, "seed": 42, "identity": run.data.tags["select_moe.identity"]}
            for s, arm, run in runs
        ]
        results = json.dumps({"verdict": {"verdict": verdict}, "stages": stages})
        mlflow.send(output(tmp_path / name, "report", files={"results.json": results}, arm=verdict))

    report("e", "no_evidence")
    assert "champion" not in mlflow.client.get_registered_model("select-moe-router").aliases
    report("f", "beats_random")
    router = mlflow.client.get_model_version_by_alias("select-moe-router", "champion")
    assert router.run_id == first.info.run_id
    assert mlflow.client.get_model_version_by_alias("select-moe-adapter", "champion").run_id == adapter.info.run_id


def test_parquet_is_previewed(mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from selectmoe.pool import Row, write_pool

    for shown in ("true", "false"):
        monkeypatch.setenv("SELECTMOE_SHOW_TEXT", shown)
        config = ToyConfig(output_dir=str(tmp_path / shown), seed=len(shown))
        with stage.begin("ingest", 1, config) as out:
            rows = [Row("a", f"id-{i:03d}", [{"role": "user", "content": f"tell me {i}"}]) for i in range(300)]
            write_pool(out.staging / "pool", rows)
            out.commit()
        run = mlflow.send(tmp_path / shown)
        assert "previews/pool/a/00000.csv" in mlflow.artifacts(run)
        file = mlflow.client.download_artifacts(run.info.run_id, "previews/pool/a/00000.csv", str(tmp_path))
        lines = Path(file).read_text().splitlines()
        assert len(lines) == 201
        assert ("tell me 3" in lines[4]) == (shown == "true")


def test_without_mlflow_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = output(tmp_path / "a", "select", work_root=str(tmp_path / "work"))
    with sending.sending(str(tmp_path / "work")) as sender:
        sending.submit(path, str(tmp_path / "work"))
    assert sender is None
    assert journal.names(str(tmp_path / "work")) == []
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        sending.sync(str(tmp_path))


def test_a_task_may_leave_the_sending_to_another_process(
    mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = sending.start_parent("quick", {}, mlflow.root, key="k")
    with monkeypatch.context() as task:
        task.setenv(sending.DEFER, "1")
        task.setenv("SELECTMOE_PARENT_RUN", parent)
        with sending.sending(mlflow.root) as sender:
            sending.submit(output(tmp_path / "a", "select"), mlflow.root)
        assert sender is None
    assert tracking._search(mlflow.client, mlflow.experiment, {"stage": "select"}) == []
    assert sending.sync(mlflow.root) == 1
    assert mlflow.run(stage="select").data.tags["mlflow.parentRunId"] == mlflow.run(key="k").info.run_id


def test_mlflow_away_costs_no_work(
    mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        away.setenv(sending.PATIENCE, "0")
        with sending.sending(mlflow.root):
            sending.submit(output(tmp_path / "a", "select", work_root=mlflow.root), mlflow.root)
        assert f"selectmoe sync {mlflow.root}" in capsys.readouterr().err
        with pytest.raises(UserError, match="did not take"):
            sending.sync(mlflow.root)
    assert sending.sync(mlflow.root) == 1
    assert sending.sync(mlflow.root) == 0
    assert mlflow.points(mlflow.run(stage="select"), "loss") == [(1, 2.0), (2, 1.0)]


def test_a_command_from_a_shell_is_told_too(
    mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    rows = [json.dumps({"messages": [messages[0] | {"content": f"why {n}"}, messages[1]]}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setenv(sending.PATIENCE, "20")
    words = ["ingest", f"data={tmp_path / 'rows.jsonl'}", "holdout=2"]
    assert cli.main([*words, f"output_dir={tmp_path / 'out'}"]) == 0
    run = mlflow.run(stage="ingest")
    assert run.info.status == "FINISHED"
    assert "previews/pool/rows/00000.csv" in mlflow.artifacts(run)
    assert journal.names(str(tmp_path / "out" / "logs")) == []
    assert cli.main([*words, f"output_dir={tmp_path / 'out'}", "seed=7"]) == 2
    assert "another run's output" in capsys.readouterr().err
    assert len(tracking._search(mlflow.client, mlflow.experiment, {"stage": "ingest"})) == 1


def test_a_chain_is_a_parent_with_a_run_per_stage(mlflow: Server, tmp_path: Path) -> None:
    config = ToyConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(Refused), sending.command("run", config):
        made = output(tmp_path / "run" / "report", "report", {"results.json": json.dumps(RESULTS)})
        output(made / "inside", "select")
        raise Refused("the gate says no")
    parents = tracking._search(mlflow.client, mlflow.experiment, {"verdict": "no_evidence"})
    assert [run.info.status for run in parents] == ["FAILED"]
    report = mlflow.run(stage="report")
    assert report.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert "SELECTMOE_PARENT_RUN" not in os.environ
    assert sending.outputs(tmp_path / "run") == [made]


def test_a_journal_on_object_storage_outlives_the_pod(
    mlflow: Server, s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow is away for the whole of a task, whose disk is then gone: all of it is there after `sync`, once."""
    root = "s3://bucket/work-of-a-pod"
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        away.setenv(sending.PATIENCE, "0")
        with sending.sending(root):
            sending.submit(output(tmp_path / "a", "warmup", {"full_rank_weights.pt": "weights"}, work_root=root), root)
    assert f"selectmoe sync {root}" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")
    assert sending.sync(root) == 1
    run = mlflow.run(stage="warmup")
    assert {"manifest.json", "full_rank_weights.pt"} <= mlflow.artifacts(run)
    assert mlflow.points(run, "loss") == [(1, 2.0), (2, 1.0)]
    assert (run.info.status, sending.sync(root), journal.names(root)) == ("FINISHED", 0, [])
    assert "journal" not in str([*open_store(root).names()])


def test_a_version_without_its_alias_gets_it(mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that was killed between the version and the alias."""
    with monkeypatch.context() as killed:
        killed.setattr("mlflow.MlflowClient.set_registered_model_alias", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            mlflow.send(output(tmp_path / "a", "warmup", arm="selected"))
    assert mlflow.client.get_registered_model("select-moe-router").aliases == {}
    assert sending.sync(mlflow.root) == 1
    assert mlflow.client.get_registered_model("select-moe-router").aliases == {"candidate": 1}
