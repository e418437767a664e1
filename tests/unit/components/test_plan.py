"""components/_plan.py: `pytest tests/unit/components/test_plan.py`."""

from __future__ import annotations

import pytest

from components import _plan
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


def test_every_parameter_of_the_pipeline_is_a_setting_or_hardware() -> None:
    from pipelines.select_moe.pipeline import select_moe

    hardware = {"accelerator_type", "accelerator_count", "memory"}
    assert {*select_moe.pipeline_spec.root.input_definitions.parameters} == {*_plan.PARAMETERS, "config"} | hardware
