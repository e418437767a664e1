"""`warmup` killed with SIGKILL, and on a disk that fills up: `pytest tests/warmup/test_interrupted.py`"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from selectmoe import cli, gate_training
from selectmoe.manifest import read_manifest
from selectmoe.storage import LocalStore

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import sys, time
from selectmoe import cli, gate_training

committed = gate_training.GateTraining._commit
gate_training.COMMIT_SECONDS = -1.0

def hold(self, step):
    committed(self, step)
    if step == 2:
        print("committed", flush=True)
        time.sleep(600)

gate_training.GateTraining._commit = hold
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def words(small_pool: Path, small_judge: Any) -> list[str]:
    keys = {"selector_model.path": small_judge("observer"), "data": small_pool, "threads": 1}
    training = {"rows": 12, "epochs": 1, "batch_size": 3, "learning_rate": 0.01}
    keys |= {f"training.{name}": value for name, value in training.items()}
    return ["warmup", *(f"{name}={value}" for name, value in keys.items())]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("whole") / "w"
    assert cli.main([*words, f"output_dir={out}"]) == 0
    return Path(out)


def steps_after(out: Path, moment: float) -> list[int]:
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if entry["name"] == "loss" and entry["time"] > moment]


def test_spec7_10_a_killed_warm_up_goes_on_to_the_same_bytes(words: list[str], whole: Path, tmp_path: Path) -> None:
    command = [*words, f"output_dir={tmp_path / 'w'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], env=environment, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "committed\n"
        process.send_signal(signal.SIGKILL)
    states = list((tmp_path / "w" / ".work").rglob(gate_training.STATE))
    assert len(states) == 1
    moment = states[0].stat().st_mtime
    assert cli.main(command) == 0
    assert steps_after(tmp_path / "w", moment) == [2, 3], "it went on from the commit"
    assert read_manifest(tmp_path / "w").identity == read_manifest(whole).identity
    assert (tmp_path / "w" / "gates.csv").read_bytes() == (whole / "gates.csv").read_bytes()


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The kernel refuses the second commit's bytes half way through."""
    command = [*words, f"output_dir={tmp_path / 'w'}"]
    real, limits, commits = LocalStore.put_bytes, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def put(self: LocalStore, name: str, data: bytes) -> None:
        if name == gate_training.STATE:
            commits.append(len(data))
            if len(commits) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, limits[1]))
        real(self, name, data)

    monkeypatch.setattr(gate_training, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(LocalStore, "put_bytes", put)
    try:
        assert cli.main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "File too large" in said
    assert "the same command goes on from its last commit" in said.splitlines()[-1]
    assert "Traceback" not in said
    state = next((tmp_path / "w" / ".work").rglob(gate_training.STATE)).read_bytes()
    assert torch.load(io.BytesIO(state), weights_only=True)["step"] == 1
    monkeypatch.setattr(LocalStore, "put_bytes", real)
    assert cli.main(command) == 0
    assert read_manifest(tmp_path / "w").identity == read_manifest(whole).identity
