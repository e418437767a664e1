"""The demo's rows and model. Run: pytest tests/unit/test_demo.py"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selectmoe import demo
from selectmoe.config import load
from selectmoe.demo import PRESETS, SOURCES, DemoConfig, quotas, run, telling, usable
from selectmoe.errors import UserError


def make(path: Path, **settings: Any) -> Path:
    return run(load(DemoConfig, {"model": False} | settings, output_dir=str(path)))


def read(path: Path) -> dict[str, list[Any]]:
    return {
        p.parent.name: [json.loads(x)["messages"] for x in p.open()] for p in sorted(path.glob("data/*/rows.jsonl"))
    }


def test_the_rows_are_real_short_and_the_same_each_time(tmp_path: Path) -> None:
    rows = read(make(tmp_path / "a", preset="tiny"))
    assert sorted(rows) == sorted(SOURCES)
    assert sum(map(len, rows.values())) == PRESETS["tiny"][0]
    for name, conversations in rows.items():
        for question, answer in conversations:
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert demo.tokens(question["content"], answer["content"]) <= PRESETS["tiny"][1], name
            assert " " in answer["content"].strip(), "an answer is words, not a letter"
    assert read(make(tmp_path / "b", preset="tiny")) == rows
    assert read(make(tmp_path / "c", preset="tiny", seed=1)) != rows


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_the_packages_hold_enough_for_every_preset(preset: str) -> None:
    rows, max_tokens = PRESETS[preset]
    enough = 2 * rows // len(SOURCES)
    available = {n: len(telling(usable(source(), max_tokens, 42), enough)) for n, source in SOURCES.items()}
    shares = quotas(available, rows)
    assert sum(shares.values()) == rows
    assert min(shares.values()) >= 30, "a handful of held-out rows would make the mean over sources noise"


def test_pairs_whose_answers_are_the_largest_part_are_taken() -> None:
    pairs = [("question", "a" * n) for n in (5, 9, 1, 7, 3, 2)]
    assert [len(answer) for _, answer in telling(pairs, 1)] == [9, 7]
    assert [len(answer) for _, answer in telling(pairs, 4)] == [5, 9, 7, 3]


def test_a_row_edited_in_place_stays(tmp_path: Path) -> None:
    make(tmp_path, preset="tiny", rows=20)
    edited = tmp_path / "data/dialog/rows.jsonl"
    edited.write_text("mine\n")
    make(tmp_path, preset="tiny", rows=20)
    assert edited.read_text() == "mine\n"
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_options_give_the_right_ones_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("Which?\nA. the first\nB. the second", "B"),
        ("Which?\na) one one\nb) two two", "a) one one"),
        ("Which?", "C"),
    ]
    monkeypatch.setattr(demo, "_evals", lambda task: iter(rows))
    assert [answer for _, answer in demo._options("x")] == ["the second", "one one"]


def test_quotas_share_evenly_and_let_the_large_make_up_for_the_small() -> None:
    assert quotas({"a": 2, "b": 100, "c": 100}, 20) == {"a": 2, "b": 9, "c": 9}
    with pytest.raises(UserError, match="rows=300 is more than the 202"):
        quotas({"a": 2, "b": 100, "c": 100}, 300)


def test_a_package_that_is_missing_names_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"chatterbot_corpus is not installed: run `make setup`.*requirements-demo.txt"):
        demo.package("chatterbot_corpus")
    with pytest.raises(UserError, match="make setup"):
        make(tmp_path, preset="tiny")
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preset=huge is unknown; known: quick, full, tiny"):
        make(tmp_path, preset="huge")
    with pytest.raises(UserError, match="rows="):
        make(tmp_path, rows=-1)


def test_what_a_killed_process_left_is_cleared_and_what_is_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / f".data.{gone.pid}").mkdir()
    (tmp_path / f".data.{os.getppid()}").mkdir()
    demo._once(tmp_path / "data", "3 rows", lambda directory: (directory / "x").touch())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".data.{os.getppid()}", "data"]
    assert capsys.readouterr().err == f"demo: writing 3 rows to {tmp_path / 'data'}\n"
