"""The compiled pipeline through KFP's local runner, killed and restarted, with real S3 and MLflow servers, on a tiny pool.

pytest tests/integration/test_pipeline.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.study_kill import Pipeline, same_result
from pipelines.select_moe.pipeline import COMPONENTS

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = [
    "river",
    "stone",
    "cloud",
    "light",
    "garden",
    "winter",
    "bridge",
    "paper",
    "market",
    "silver",
    "window",
    "letter",
    "summer",
    "harbour",
]


def pool(path: Path) -> Path:
    path.mkdir()
    for source in range(6):
        with open(path / f"source{source}.jsonl", "w", encoding="utf-8") as file:
            for i in range(12):
                at = (source * 5 + i * 3) % len(WORDS)
                turns = [
                    {"role": "user", "content": f"Question {i} of source {source}: what is a {WORDS[at]}?"},
                    {"role": "assistant", "content": f"A {WORDS[at]} is near the {WORDS[(at + i) % len(WORDS)]} {i}."},
                ]
                file.write(json.dumps({"id": f"s{source}-{i:02d}", "messages": turns}) + "\n")
    return path


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """Of our own servers, and one thread for each of the two tasks that run side by side."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SELECTMOE_S3_PORT", "SELECTMOE_MLFLOW_PORT", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


class Here:
    """A state folder, and commands that run in it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.data = pool(folder / "pool")
        self.settings = ("preset=tiny", f"data={self.data}", "shards=2")
        self.pipeline = Pipeline(self.state, self.settings)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"SELECTMOE_STATE": str(self.state)}
        command = [sys.executable, "-m", "pipelines.local", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)

    def run(self, *further: str) -> str:
        done = self.call("run", *self.settings, *further)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def executed(self) -> list[str]:
        return [json.loads(line)["stage"] for line in (self.state / "events.jsonl").read_text().splitlines()]

    def mlflow(self, path: str, **body: Any) -> Any:
        servers = json.loads((self.state / "servers.json").read_text())
        url = f"http://127.0.0.1:{servers['mlflow']['port']}/api/2.0/mlflow/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    found = Here(tmp_path_factory.mktemp("pipeline"))
    yield found
    found.call("down")


@pytest.mark.timeout(2400)
def test_from_rows_to_a_verdict_and_again(here: Here, tmp_path: Path) -> None:
    every = {str(item.name) for item in COMPONENTS} - {"upcycle", "adopt"}
    begun: set[str] = set()
    for stage in ("warmup", "finetune"):
        here.pipeline.kill_in(stage, after=0.5)
        begun |= set(here.executed())
    said = here.run()
    assert "verdict: " in said
    assert "make down" in said
    assert "convert" not in here.executed(), "what was finished before the kill is not done again"
    assert begun | set(here.executed()) == every

    alone = [sys.executable, "-m", "selectmoe", "run", *here.settings, f"output_dir={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert same_result(tmp_path / "alone" / "report", here.pipeline.finished()["report"])
    servers = (here.state / "servers.json").read_text()

    said = here.run()
    assert here.executed() == ["check", "finish"]
    assert "all stages came from the cache" in said
    assert (here.state / "servers.json").read_text() == servers, "what is up is used again"

    # What changes re-runs what is downstream: tests/unit/pipelines/test_mutation.py varies everything, without executing it.
    refused = here.call("run", *here.settings, "report.gate=fail")
    assert refused.returncode == 3
    assert here.executed() == ["check", "gate", "gate", "finish"], "the second note is its failure"
    assert "report.html" in refused.stderr
    here.run("report.show_text=false")
    assert here.executed() == ["check", "report", "gate", "finish"]

    experiments = here.mlflow("experiments/search", max_results=10)["experiments"]
    ours = next(e["experiment_id"] for e in experiments if e["name"] == "select-moe")
    runs = here.mlflow("runs/search", experiment_ids=[ours], max_results=500)["runs"]
    tags = [{t["key"]: t["value"] for t in run["data"]["tags"]} for run in runs]
    parents = [run["info"]["run_id"] for run, tag in zip(runs, tags, strict=True) if "mlflow.parentRunId" not in tag]
    assert len(parents) == 2, "one per plan; the unchanged run went on in the first one"
    stages = {tag["select_moe.stage"] for tag in tags if tag.get("mlflow.parentRunId") == parents[0]}
    assert {"ingest", "convert", "warmup", "route", "select", "finetune", "evaluate", "report"} <= stages
    stored = {p.name for p in (here.state / "s3").rglob("*") if p.is_file()}
    assert {"report.html", "full_rank_weights.safetensors", "selected_data.jsonl"} <= stored
    assert "model.safetensors" not in stored, "checkpoints are there by reference"

    keys = json.loads((here.state / "credentials.json").read_text())
    logs = "".join(p.read_text(errors="replace") for p in here.state.glob("*.log"))
    assert not any(key in logs for key in keys.values())
    assert here.call("down").stdout.startswith("stopped: ")
    assert here.call("down").stdout == "nothing was up\n"


def test_a_mistake_is_said_before_anything_starts(tmp_path: Path) -> None:
    here = Here(tmp_path)
    done = here.call("run", "preset=tiny", f"data={tmp_path / 'missing.jsonl'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing.jsonl" in done.stderr
    assert not here.state.exists()
