"""The seed's commands for conversion. Run: pytest tests/unit/test_seed_conversion.py"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import olmoe

from selectmoe import checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
SAVED = "converted_models/select_moe_converted_OLMoE-1B-7B-0125"


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """Run a script of the seed's in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return int(end.value.code or 0)


def test_convert_and_compare_as_the_seed_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = olmoe(tmp_path / "olmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    named = ["--source-model", str(source), "--save-path", f"./{SAVED}"]
    assert script(monkeypatch, "convert_olmoe_to_select_moe.py", *named, "model.quality_gate_init_std=0.5") == 0
    said = capsys.readouterr().out.splitlines()
    assert "model.gate_mode=observer" in said[0]
    assert said[-1] == SAVED
    tensors = dict(checkpoint.read_tensors(tmp_path / SAVED))
    assert tensors["model.norm.weight"].dtype == torch.bfloat16  # the seed's default
    assert float(tensors["model.layers.0.quality_gate.weight"].std()) > 0.2
    assert json.loads((tmp_path / SAVED / "config.json").read_text())["gate_mode"] == "applied"

    compared = ["--original-model", str(source), "--dtype"]
    assert script(monkeypatch, "compare_converted_model.py", *compared, "bfloat16", "max_length=16") == 0
    place = Path(capsys.readouterr().out.splitlines()[-1])
    assert place.parts[:2] == ("outputs", "verify")
    assert json.loads((place / "verify.json").read_text())["equal"]
    assert script(monkeypatch, "compare_converted_model.py", *compared, "keep", "output_dir=kept", "rows=0") == 3
    assert "became bfloat16" in capsys.readouterr().err


def test_what_is_missing_or_unknown_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "convert_olmoe_to_select_moe.py") == 2
    assert "--save-path" in capsys.readouterr().err
    gone = ["--source-model", str(tmp_path / "gone"), "--save-path", "x"]
    assert script(monkeypatch, "convert_olmoe_to_select_moe.py", *gone) == 2
    assert "does not exist" in capsys.readouterr().err
    assert script(monkeypatch, "convert_olmoe_to_select_moe.py", *gone, "--devices=2") == 2
    assert "unknown key '--devices'" in capsys.readouterr().err


def test_the_wrapper_adds_the_seeds_folder_where_none_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def words(*arguments: str) -> list[str]:
        command = ["bash", str(SCRIPTS / "convert.sh"), *arguments]
        done = subprocess.run(
            command, env=os.environ | {"PYTHON": str(fake)}, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    program = str(SCRIPTS / "convert_olmoe_to_select_moe.py")
    assert words("--dtype", "keep") == [program, "--save-path", f"./{SAVED}", "--dtype", "keep"]
    assert words("--save-path", "a b") == [program, "--save-path", "a b"]
