"""pipelines/local.py without a pipeline: `pytest tests/unit/pipelines/test_local.py`."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import local
from selectmoe.errors import UserError


def test_settings_become_pipeline_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    got = local._pipeline_arguments(
        ["preset=tiny", "data=rows.jsonl", "arms=[selected,random]", "report.gate=fail", "k=v", "seeds=4"], tmp_path
    )
    assert got == {
        "preset": "tiny",
        "data": str(tmp_path / "rows.jsonl"),
        "work_root": str(tmp_path / "work"),
        "arms": "selected,random",
        "gate": "fail",
        "seeds": 4,
        "config": [
            "k=v",
            f"finetune.threads={half}",
            f"evaluate.threads={half}",
            f"demo_dir={tmp_path / 'demo'}",
            f"model_root={tmp_path / 'models'}",
            "mlflow.required=false",
        ],
    }
    with pytest.raises(UserError, match="whole number"):
        local._pipeline_arguments(["seeds=four"], tmp_path)
    with pytest.raises(UserError, match="key=value"):
        local._pipeline_arguments(["tiny"], tmp_path)


def test_events_tell_what_ran_and_what_failed(tmp_path: Path) -> None:
    events = [{"stage": "check"}, {"stage": "route"}, {"stage": "route"}]
    failure = {"stage": "route", "exit": 3, "message": "no"}
    path = tmp_path / "events"
    path.write_text("".join(json.dumps(e) + "\n" for e in [*events, failure]))
    assert local._read_events(path) == (Counter(check=1, route=2), ("route", 3, "no"))


def test_all_from_the_cache_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = SimpleNamespace(arm_seeds=["selected:0", "random:0"], judge="olmoe", shards=2)
    expected = local._expected(plan)
    assert expected["evaluate"] == 3
    assert expected["adopt"] == 1
    local._say(Counter(check=1), expected, 3.0, "no evidence", tmp_path, "http://x")
    assert "all stages came from the cache" in capsys.readouterr().out
    local._say(expected - Counter(ingest=1), expected, 3.0, "no evidence", tmp_path, "http://x")
    assert "from the cache: ingest" in capsys.readouterr().out


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with local._alone(tmp_path), pytest.raises(UserError, match="another run"), local._alone(tmp_path):
        pass


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["dance"]) == 2
    assert capsys.readouterr().err.startswith("selectmoe: usage")
