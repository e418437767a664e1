"""The predecessor's stage 2: which key goes where, and what is refused. Run: pytest tests/unit/test_seed_stage_2.py

The whole, as it is typed: tests/warmup/test_stage_2_script.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selectmoe import seed_commands, seed_stage_2
from selectmoe.errors import UserError
from selectmoe.seed_stage_2 import split

WEIGHTS = "model_checkpoint_path=w.pt"


def test_every_key_goes_to_the_stage_that_has_it() -> None:
    words = split(
        [WEIGHTS, "clustering_method=kmeans", "clustering_params.k=50", "clustering_params.auto_k=false", "seed=7"]
        + ["selection_percentage=0.1", "max_length=512", "data=p", "work_root=w", "tag=x", "batch_size=4"]
    )
    assert words.route == {
        "selector_model.path": seed_commands.JUDGE,
        "export_legacy": "true",
        "model_checkpoint_path": "w.pt",
        "max_length": "512",
        "batch_size": "4",
        "data": "p",
        "seed": "7",
        "work_root": "w",
    }
    assert words.select == {
        "picking": "legacy",
        "method": "kmeans",
        "score": "legacy",
        "clustering_params.k": "50",
        "clustering_params.auto_k": "false",
        "selection_percentage": "0.1",
        "seed": "7",
        "work_root": "w",
    }
    assert words.name == ["tag=x"]
    assert not words.debug


def test_defaults_and_what_overrides_them() -> None:
    assert split([WEIGHTS]).route["dataset.local.dataset_names"] == "[cot,dolly,flan_v2,oasst1]"
    assert "dataset.local.dataset_names" not in split([WEIGHTS, "dataset.local.data_dir=d"]).route
    observer = split([WEIGHTS, "recipe=observer", "picking=coverage", "export_legacy=false", "debug_print=True"])
    assert observer.select == {"picking": "coverage", "method": "kmeans", "score": "answer"}
    assert observer.route["export_legacy"] == "false"
    assert observer.debug
    assert split([WEIGHTS, "method=random"]).select == {"method": "random", "score": "legacy"}
    assert split([WEIGHTS, "skip_data_selection=true"]).select is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model_checkpoint_path= is missing"),
        (["model_checkpoint_path="], "model_checkpoint_path= is missing"),
        (["model_checkpoint_path=w.pt", "data=p"], "model_checkpoint_path=w.pt does not exist"),
        (["{w}", "data=nowhere", "selector_model.path={j}"], "nowhere does not exist"),
        (["{w}", "selector_model.path=nowhere/else"], "selector_model.path"),
        (["{w}", "max_lenght=5"], "nearest known: max_length"),
        (["{w}", "clustering_params.kk=5"], "nearest known: clustering_params.k"),
        (["{w}", "clustering_params.enable_parallel_kmeans=true"], "unknown key"),
        (["{w}", "clustering_params.k=5", "clustering_params.auto_k=true"], "give k, or auto_k"),
        (["{w}", "selection_percentage=1.5"], "1.5"),
        (["{w}", "clustering_params.k=5", "picking=coverage"], "has no effect under allocation coverage"),
        (["{w}", "skip_data_selection=true", "selection_percentage=0.1"], "is not read with skip_data_selection"),
        (["{w}", "skip_data_selection=maybe"], "must be true or false"),
        (["{w}", "recipe=other"], "known: legacy, observer"),
        (["{w}", "router_data_dir=x"], "give it to `selectmoe select`"),
        (["{w}", "clustering_method=kmeans", "method=top"], "are the same key"),
        (["{w}", "clustering_method=dbscan"], "method='dbscan' is unknown"),
        (["{w}", "selector_model.path={j}"], "dataset/train/processed"),
        (["{w}", "data=p", "dataset.local.data_dir=d"], "dataset.* is read without data= only"),
        (["{w}", "word"], "not of the form key=value"),
        (["token=hf_x"], "looks like a credential"),
    ],
)
def test_input_is_checked_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text('{"model_type": "select_moe"}')
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seed_commands.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    before = {*tmp_path.rglob("*")}
    given = [word.format(w="model_checkpoint_path=weights.pt", j="judge") for word in words]
    assert seed_commands.main(["stage_2", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("run_stage_2: ")
    new = {*tmp_path.rglob("*")} - before
    assert not [path for path in new if path.is_file() or re.match(r"\d\d-", path.name)]


def test_a_process_for_every_gpu_and_select_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see what would be started."""
    started: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seed_stage_2, "prove", lambda *paths: None)
    monkeypatch.setattr(seed_commands, "logged", lambda command, *rest: started.append(command[2:]) or len(started) - 1)
    monkeypatch.setattr(seed_commands, "devices", lambda: 4)
    assert seed_stage_2.stage_2([WEIGHTS, "data=p", "output_dir=out"]) == 1  # as the second one says
    routing, selecting = started
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"]
    assert routing[:6] == [*torchrun, "selectmoe.cli", "route"]
    assert selecting[:2] == ["selectmoe.cli", "select"]
    assert {"router_data_dir=out", "data=p", "output_dir=out/selection"} <= {*selecting}
    assert not (tmp_path / "out" / "selected_data.jsonl").exists()


def test_help_lists_the_keys_of_both_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert seed_commands.main(["stage_2", "--help"]) == 0
    said = capsys.readouterr().out
    for key in ("model_checkpoint_path", "clustering_params.k", "export_legacy"):
        assert f"  {key}  " in said


def test_spec7_18_a_missing_file_is_an_error_before_any_work() -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        seed_stage_2.stage_2(["model_checkpoint_path=nowhere.pt", "data=p"])
