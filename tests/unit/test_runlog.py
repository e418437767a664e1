"""selectmoe/runlog.py: `pytest tests/unit/test_runlog.py`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from selectmoe import runlog


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(runlog.RUN, "run-1")
    monkeypatch.delenv(runlog.WEBHOOK, raising=False)
    return str(tmp_path / "work")


def test_a_run_that_went_well(root: str) -> None:
    record = runlog.Record(root, "check")
    record.entry["plan"] = "p"
    record.end()
    runlog.keep_result(root, "p", "s3://b/report", "beats random", "1d")
    for _ in range(2):
        task = runlog.Record(root, "route", accelerator="nvidia.com/gpu", count=2, memory="16Gi")
        task.entry["started"] -= 1800
        task.end()
    told = runlog.tell(root, succeeded=True)
    assert told["tasks"] == {"check": 1, "route": 2}
    assert told["accelerator_hours"] == pytest.approx(2.0, abs=0.01)
    assert (told["report"], told["verdict"], told["reason"]) == ("s3://b/report", "beats random", "")
    assert told["identity"] == "1d"
    text = runlog.markdown(told)
    assert "Run run-1: succeeded" in text
    assert "| route | 2 | 3600" in text
    assert json.loads((Path(root) / "runs" / "run-1.json").read_text()) == told
    assert not (Path(root) / "runs" / "run-1").exists(), "the single notes are in it"


def test_the_stage_and_the_reason_of_a_failure(root: str) -> None:
    runlog.Record(root, "ingest").end(2, "data= holds no usable row")
    told = runlog.tell(root, succeeded=False)
    assert (told["stage"], told["reason"]) == ("ingest", "exit 2: data= holds no usable row")
    assert "**ingest**: exit 2" in runlog.markdown(told)


def test_a_retry_that_went_well_is_no_reason(root: str) -> None:
    runlog.Record(root, "warmup").end(1, "OSError: reset")
    runlog.Record(root, "warmup").end()
    runlog.Record(root, "gate").end(3, "does not beat random")
    assert runlog.tell(root, succeeded=False)["stage"] == "gate"


def test_a_task_that_was_killed_is_named(root: str) -> None:
    runlog.Record(root, "check").end()
    runlog.Record(root, "warmup")
    told = runlog.tell(root, succeeded=False)
    assert told["stage"] == "warmup"
    assert "killed" in told["reason"]


def test_a_pod_that_never_started_leaves_no_reason_but_a_hint(root: str) -> None:
    assert "could not start" in runlog.tell(root, succeeded=False)["reason"]


def test_outside_a_pipeline_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runlog.RUN, raising=False)
    runlog.Record(str(tmp_path / "work"), "check").end()
    assert not (tmp_path / "work").exists()


class Hook(BaseHTTPRequestHandler):
    got: ClassVar[list[dict[str, object]]] = []
    code = 200

    def do_POST(self) -> None:
        type(self).got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(type(self).code)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hook]]:
    Hook.got, Hook.code = [], 200
    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(runlog.WEBHOOK, f"http://127.0.0.1:{server.server_port}/secret-token")
    yield Hook
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_webhook_is_told(root: str, hook: type[Hook]) -> None:
    runlog.Record(root, "gate").end(3, "no")
    assert runlog.post(runlog.tell(root, succeeded=False)) == "webhook: 200"
    assert hook.got[0]["stage"] == "gate"
    assert "Run run-1: failed" in str(hook.got[0]["text"])


def test_a_webhook_that_fails_costs_nothing_and_is_not_named(
    root: str, hook: type[Hook], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = runlog.tell(root, succeeded=True)
    hook.code = 500
    assert runlog.post(told) == "webhook: failed (HTTPError 500)"
    monkeypatch.setenv(runlog.WEBHOOK, "http://127.0.0.1:9/secret-token")
    assert runlog.post(told) == "webhook: failed (URLError)"
    monkeypatch.setenv(runlog.WEBHOOK, "not an address")
    assert runlog.post(told) == "webhook: failed (ValueError)"
    monkeypatch.delenv(runlog.WEBHOOK)
    assert runlog.post(told) == ""
