"""The sweep's pipeline through KFP's local runner: `pytest tests/integration/test_sweep.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selectmoe import runlog

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import sys
from kfp import local
from pipelines.sweep.pipeline import Graph
root = sys.argv[1]
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root + "/kfp", enable_caching=True, cache_root=root + "/cache")
given = dict(word.split("=", 1) for word in sys.argv[2:])
Graph().pipeline(work_root=root + "/work", **given)
"""


class Sweep:
    def __init__(self, root: Path, world: dict[str, str]) -> None:
        self.root = root
        self.given = {"router_data": world["router_data_dir"], "pool": world["data"], "budget": "9"}
        self.runs = 0

    def run(self, **changes: str) -> tuple[int, set[str], dict[str, str]]:
        """Exit status, the tasks that were executed, and what the exit handler told."""
        self.runs += 1
        events = self.root / "events"
        events.unlink(missing_ok=True)
        environment = os.environ | {"SELECTMOE_EVENTS": str(events), runlog.RUN: f"run-{self.runs}"}
        environment |= {"PYTHONPATH": str(ROOT)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        words = [f"{key}={value}" for key, value in (self.given | changes).items()]
        command = [sys.executable, "-c", PROGRAM, str(self.root), *words]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=800)
        told = json.loads((self.root / "work" / "runs" / f"run-{self.runs}.json").read_text())
        return done.returncode, {json.loads(line)["stage"] for line in events.read_text().splitlines()}, told


@pytest.mark.timeout(1500)
def test_settings_are_compared_and_what_is_known_is_not_done_again(
    routed_world: dict[str, str], tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "sweep", routed_world)
    (tmp_path / "sweep").mkdir()
    settings = "kmeans+drop-0.5,kmeans+layers-1,top-nll"
    code, executed, told = sweep.run(settings=settings)
    assert code == 0
    assert executed == {"check", "reuse", "select", "compare", "gate", "finish"}
    found = json.loads(Path(told["report"], "results.json").read_text())
    names = {entry["name"] for entry in found["selections"]}
    assert {"selected", "kmeans+drop-0.5", "kmeans+layers-1", "top-nll", "random-0"} <= names
    assert told["verdict"] == "nothing was fine-tuned on these selections"

    assert sweep.run(settings=settings)[1] == {"check", "finish"}
    assert sweep.run(settings=f"{settings},length")[1] == {"check", "select", "compare", "gate", "finish"}
    code, executed, told = sweep.run(settings=settings, gate="fail")
    assert (code, executed, told["stage"]) == (1, {"check", "gate", "finish"}, "gate")
    assert told["report"], "the comparison is there all the same"
    code, executed, told = sweep.run(settings="kmeans+dorp-1")
    assert (code, executed, told["stage"]) == (1, {"check", "finish"}, "check")
    assert "no setting 'dorp'" in told["reason"]
