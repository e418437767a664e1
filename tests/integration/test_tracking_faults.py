"""MLflow killed, stopped and refusing while a stage runs: nothing is lost, nothing doubled, no step waits.

pytest tests/integration/test_tracking_faults.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow_server import MlflowServer, Proxy

from selectmoe import journal, sending, tracking

STEPS = 60
TASK = """
import sys, time
from pathlib import Path
from selectmoe import sending, stage
from selectmoe.config import StageConfig
folder, root, pause, first = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
with sending.sending(root):
    with stage.begin("warmup", 1, StageConfig(output_dir=folder, work_root=root)) as out:
        for step in range(first, STEPS):
            out.metric("loss", 1 / (step + 1), step=step)
            print(step, flush=True)
            time.sleep(pause)
        (out.staging / "weights.safetensors").write_text(folder)  # another identity in every test
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
    """A stage in a process of its own, as a task of a cluster: it sends by itself. Its experiment has its folder's name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.root = str(folder / "work")
        self.monkeypatch = monkeypatch
        self.process: subprocess.Popen[str]
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "SELECTMOE_PARENT_RUN", "KFP_RUN_ID", sending.DEFER):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5"
        )  # of `complete`: a server that was stopped comes round

    def start(self, uri: str, pause: float = 0.05, first: int = 0, patience: int = 1) -> None:
        environment = {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_EXPERIMENT_NAME": self.folder.name,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            sending.PATIENCE: str(patience),
        }
        command = [sys.executable, "-c", TASK, str(self.folder / "out"), self.root, str(pause), str(first)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def reaches(self, step: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if int(line) >= step:
                return
        raise AssertionError(self.process.communicate()[1])

    def ends_well(self) -> str:
        _, error = self.process.communicate(timeout=100)
        assert self.process.returncode == 0, error
        return error

    def kept(self) -> list[str]:
        return journal.names(self.root)

    def complete(self, uri: str) -> None:
        """Send what is left; then everything is there once."""
        self.monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        self.monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", self.folder.name)
        sending.sync(self.root)
        assert self.kept() == []
        client, experiment = tracking._client()
        (run,) = client.search_runs([experiment])
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(STEPS))
        assert "weights.safetensors" in set(tracking._listed(client, run.info.run_id, ""))
        (version,) = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        assert version.name == "select-moe-router"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Task]:
    def make(name: str) -> Task:
        return Task(tmp_path / name, monkeypatch)

    return make


def test_killed_at_the_start_in_the_middle_and_at_the_end(server: MlflowServer, task: Callable[[str], Task]) -> None:
    """One death of the server, three tasks that it meets at different moments."""
    start, middle, end = task("start"), task("middle"), task("end")
    middle.start(server.url, 0.5, patience=100)
    end.start(server.url, 0.1)
    end.reaches(STEPS - 1)
    server.kill()
    start.start(server.url)
    assert "selectmoe sync" in start.ends_well()
    assert "selectmoe sync" in end.ends_well()
    assert start.kept()
    assert end.kept()
    server.start()
    middle.ends_well()
    assert middle.kept() == [], "the task itself sent everything"
    for each in (start, middle, end):
        each.complete(server.url)


def test_stopped_it_is_slow_and_no_step_waits(server: MlflowServer, task: Callable[[str], Task]) -> None:
    stopped = task("stopped")
    stopped.start(server.url, 0.1)
    stopped.reaches(20)
    server.signal(signal.SIGSTOP)
    try:
        stopped.ends_well()
    finally:
        server.signal(signal.SIGCONT)
    stopped.complete(server.url)


def test_errors_and_refusals_to_the_end(server: MlflowServer, task: Callable[[str], Task]) -> None:
    proxies = {status: Proxy(server.port) for status in (500, 401)}
    tasks = {status: task(str(status)) for status in proxies}
    try:
        for status, proxy in proxies.items():
            tasks[status].start(proxy.url, 0.1)
        for status, proxy in proxies.items():
            tasks[status].reaches(20)
            proxy.status = status
        for status, proxy in proxies.items():
            tasks[status].ends_well()
            assert proxy.refused > 0
    finally:
        for proxy in proxies.values():
            proxy.close()
    for each in tasks.values():
        each.complete(server.url)


def test_a_killed_task_goes_on_in_its_run(server: MlflowServer, task: Callable[[str], Task]) -> None:
    killed = task("killed")
    killed.start(server.url, 0.1)
    killed.reaches(40)
    killed.process.kill()
    killed.process.wait()
    killed.start(server.url, 0.01, first=10)
    killed.ends_well()
    killed.complete(server.url)
