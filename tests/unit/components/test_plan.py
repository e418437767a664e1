"""components/_plan.py: `pytest tests/unit/components/test_plan.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from components import _plan
from components._shell import Hardware
from selectmoe.errors import UserError

GIVEN = {"preset": "tiny", "data": "", "arms": "selected,random", "seeds": 0, "shards": 2, "work_root": "w"}


def test_a_parameter_is_a_setting_and_an_empty_one_is_the_presets() -> None:
    words = _plan.overrides(GIVEN | {"tasks": "mine,yours", "gate": "fail"}, ["seed=7"])
    assert words == [
        "preset=tiny",
        "arms=[selected,random]",
        "shards=2",
        "work_root=w",
        "evaluate.tasks=[mine,yours]",
        "report.gate=fail",
        "seed=7",
    ]


def test_a_setting_that_is_a_parameter_is_refused_in_config() -> None:
    with pytest.raises(UserError, match="pipeline's own parameter gate"):
        _plan.overrides(GIVEN, ["report.gate=off"])


def test_the_gate_is_a_step_of_its_own_and_models_lie_below_the_work_root() -> None:
    settings, mode = _plan.compose(GIVEN | {"gate": "fail"}, [], "out")
    assert (mode, settings.report.gate) == ("fail", "off")
    assert settings.model_root == "w/models"
    assert settings.seeds == 3, "the preset's"


def test_a_mistake_in_config_is_said() -> None:
    with pytest.raises(UserError, match="budgt"):
        _plan.compose(GIVEN, ["budgt=5"], "out")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"accelerator_type": "nvidia.com/gpus", "accelerator_count": 1},
            "accelerator.type=nvidia.com/gpus is unknown",
        ),
        ({"memory": "16GB"}, "accelerator.memory=16GB is no Kubernetes quantity"),
    ],
)
def test_what_a_task_asks_for_is_checked(given: dict[str, str | int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        _plan.compose(GIVEN | given, [], "out")


@pytest.mark.parametrize("config", [["dry_run=true"], ["bugdet=5"]])
def test_a_mistake_ends_the_task_with_one_line(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = SimpleNamespace(path=str(tmp_path / "checked"), metadata={})
    with pytest.raises(SystemExit) as ended:
        _plan.check(artifact, GIVEN | {"work_root": str(tmp_path)}, config, Hardware("", 0, ""))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(("check: dry_run=true", "check: unknown key 'bugdet'"))


def test_a_work_root_that_takes_no_record_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    artifact = SimpleNamespace(path=str(tmp_path / "checked"), metadata={})
    with pytest.raises(SystemExit) as ended:
        _plan.check(artifact, GIVEN | {"work_root": "s3://bucket/work"}, [], Hardware("", 0, ""))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("check: s3://bucket/work/.probe: the S3 server at http://127.0.0.1:1")


def test_every_parameter_of_the_pipeline_is_a_setting() -> None:
    from pipelines.select_moe.pipeline import select_moe

    assert {*select_moe.pipeline_spec.root.input_definitions.parameters} == {*_plan.PARAMETERS, "config"}
