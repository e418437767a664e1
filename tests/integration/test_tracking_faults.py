"""MLflow killed, stopped and refusing while a stage runs: nothing is lost, nothing doubled, no step waits.

pytest tests/integration/test_tracking_faults.py
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer, Proxy

from selectmoe import journal, sending, tracking

STEPS = 60
TASK = """
import sys, time
from pathlib import Path
from selectmoe import sending, stage
from selectmoe.config import StageConfig
folder, root, pause, crash = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
with sending.sending(root):
    with stage.begin("warmup", 1, StageConfig(output_dir=folder, work_root=root)) as out:
        for step in range(crash and 10, STEPS):
            out.metric("loss", 1 / (step + 1), step=step)
            print(step, flush=True)
            time.sleep(pause)
        (out.staging / "weights.safetensors").write_bytes(b"w" * 1000)
        out.commit()
    sending.submit(folder, root)
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    made = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()


class Task:
    """A stage in a process of its own, as a task of a cluster: it sends by itself."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.root = str(folder / "work")
        self.environment = monkeypatch
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv(sending.PATIENCE, "1")
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "SELECTMOE_PARENT_RUN", "KFP_RUN_ID", sending.DEFER):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", folder.name)

    def start(self, uri: str, pause: float = 0.05, again: bool = False) -> subprocess.Popen[str]:
        self.environment.setenv("MLFLOW_TRACKING_URI", uri)
        command = [sys.executable, "-c", TASK, str(self.folder / "out"), self.root, str(pause), str(int(again))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def complete(self, uri: str) -> Any:
        """Send what is left; then everything is there once."""
        self.environment.setenv("MLFLOW_TRACKING_URI", uri)
        sending.sync(self.root)
        assert journal.names(self.root) == []
        client, experiment = tracking._client()
        (run,) = client.search_runs([experiment])
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(STEPS))
        assert "weights.safetensors" in set(tracking._listed(client, run.info.run_id, ""))
        versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        assert len(versions) == 1
        return run


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    return Task(tmp_path, monkeypatch)


def ends_well(process: subprocess.Popen[str]) -> str:
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    return error


def at_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return


def test_killed_at_the_start_and_back_after_the_end(server: MlflowServer, task: Task) -> None:
    server.kill()
    said = ends_well(task.start(server.url))
    server.start()
    assert f"selectmoe sync {task.root}" in said
    task.complete(server.url)


def test_killed_in_the_middle_and_back_before_the_end(server: MlflowServer, task: Task) -> None:
    task.environment.setenv(sending.PATIENCE, "100")
    process = task.start(server.url, 0.2)
    at_step(process, 20)
    server.kill()
    at_step(process, 30)
    server.start()
    ends_well(process)
    assert journal.names(task.root) == [], "the task itself sent everything"
    task.complete(server.url)


def test_killed_at_the_end(server: MlflowServer, task: Task) -> None:
    process = task.start(server.url, 0.2)
    at_step(process, STEPS - 1)
    server.kill()
    ends_well(process)
    server.start()
    task.complete(server.url)


def test_stopped_it_is_slow_and_no_step_waits(server: MlflowServer, task: Task) -> None:
    process = task.start(server.url, 0.1)
    at_step(process, 20)
    server.signal(signal.SIGSTOP)
    try:
        ends_well(process)
    finally:
        server.signal(signal.SIGCONT)
    task.complete(server.url)


@pytest.mark.parametrize("status", [500, 401])
def test_errors_and_refusals_to_the_end(server: MlflowServer, task: Task, status: int) -> None:
    proxy = Proxy(server.port)
    try:
        process = task.start(proxy.url, 0.1)
        at_step(process, 20)
        proxy.status = status
        ends_well(process)
        assert proxy.refused > 0
    finally:
        proxy.close()
    task.complete(server.url)


def test_a_killed_task_goes_on_in_its_run(server: MlflowServer, task: Task) -> None:
    process = task.start(server.url, 0.1)
    at_step(process, 40)
    process.kill()
    process.wait()
    ends_well(task.start(server.url, 0.01, again=True))
    task.complete(server.url)
