"""The whole study on a tiny model, killed in the middle and started again: make study-test, in about a minute."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.judge import design

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_killed_study_goes_on_and_writes_everything(tmp_path):
    folder, out = tmp_path / "work", tmp_path / "page"
    command = [sys.executable, "-m", "bench.study_judge", str(folder), "--smoke", "--page", str(out)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while len(list(folder.glob("*/cells/*.npz"))) < 30 and first.poll() is None:
        time.sleep(0.02)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (clock,) = folder.glob("*/clock.json")
    before = json.loads(clock.read_text())
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/cells/*.npz")}

    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # nothing that was finished is done twice
    results = json.loads((out / "judge.json").read_text())
    assert results["wall_seconds"] > before > 0  # of both starts
    d = design.smoke()
    cells = [*design.observer_cells(d), *design.applied_cells(d)]
    names = {path.stem for path in folder.glob("*/cells/*.npz")}
    assert {cell.name for cell in [*cells, *design.untrained_cells(d, "A"), *design.untrained_cells(d, "B")]} < names

    controls = results["controls"]
    assert controls["untrained"]["A"]["bias 0, raw"]["n"] == 20
    assert controls["sum_with_negated"]["smallest"] == pytest.approx(1, abs=1e-3)
    assert controls["sum_with_negated"]["largest"] == pytest.approx(1, abs=1e-3)
    assert controls["nothing_planted"]["value"] == pytest.approx(0.5, abs=0.05)
    assert max(controls["shortcut_error"].values()) < 1e-5
    scored = {(g["cell"]["mode"], name) for g in results["groups"] for name in g["scores"]}
    assert ("applied", "router_entropy") in scored
    assert ("observer", "router_entropy") not in scored  # its routers read what they read without it
    assert {group["cell"]["loss"] for group in results["confirmed"]["groups"]} >= {results["chosen"]["cell"]["loss"]}
    assert [row["source"] for row in results["unseen"]] == list(d.names("A"))
    assert (out / "judge.png").stat().st_size < 300_000
    text = (out / "judge.md").read_text()
    for loss in (*design.LOSSES, "none"):
        assert f"| observer | {loss}" in text
    assert "smoke run" in text
    assert "nan" not in text

    again = json.loads((out / "judge.json").read_text())
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    same = json.loads((out / "judge.json").read_text())
    passing = ("wall_seconds", "load")
    assert {k: v for k, v in same.items() if k not in passing} == {k: v for k, v in again.items() if k not in passing}
