"""selectmoe/clean.py: `pytest tests/unit/test_clean.py`."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from selectmoe import clean
from selectmoe.cli import main
from selectmoe.config import load
from selectmoe.errors import UserError


def work(root: Path, name: str, days: float, *files: str) -> Path:
    folder = root / name
    for file in files or ("state",):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 10)
    then = time.time() - days * 86400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))
    return folder


def run(root: Path, **given: str | bool) -> None:
    clean.run(load(clean.CleanConfig, given, work_root=str(root)))


def test_only_what_is_old_unlocked_and_unfinished_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, young = work(tmp_path, "warmup/a", 8), work(tmp_path, "warmup/b", 6)
    done = work(tmp_path, "finished/select-a", 30, "manifest.json")
    left = work(tmp_path, "finished/select-b", 30, ".work/key")
    held = work(tmp_path, "finetune/a", 30, "lock")
    unsent = work(tmp_path, "journal/x", 30)
    run(tmp_path)
    assert "warmup/a" in capsys.readouterr().out
    assert old.exists(), "without yes=true it only says so"
    with open(held / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(tmp_path, yes=True)
    assert not old.exists()
    assert not left.exists()
    assert all(path.exists() for path in (young, done, held, unsent))
    run(tmp_path, yes=True, finished=True, older_than="1h")
    assert not any(path.exists() for path in (young, done, held))
    assert unsent.exists()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="older_than=week"):
        run(tmp_path, older_than="week")
    with pytest.raises(UserError, match="not a folder"):
        run(tmp_path / "nothing")


def test_the_command_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work(tmp_path / "root", "warmup/a", 8)
    monkeypatch.chdir(tmp_path)
    assert main(["clean", "work_root=root", "yes=true"]) == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["root", "warmup"]
    assert main(["clean", "work_root=root", "seed=1"]) == 2
