"""pipelines/profile.py and `python -m pipelines compile`: `pytest tests/unit/pipelines/test_profile.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.__main__ import ROOT, main
from pipelines.profile import ACCELERATED, Profile, load
from selectmoe.errors import UserError

EXAMPLE = ROOT / "pipelines" / "site.example.yaml"
IMAGE = "registry.example.org/select-moe@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline for the example's site: its spec, and what Kubernetes is told of every task, by component."""
    target = tmp_path_factory.mktemp("site") / "pipeline.yaml"
    assert main(["compile", f"profile={EXAMPLE}", f"output={target}"]) == 0
    spec, platform = yaml.safe_load_all(target.read_text(encoding="utf-8"))
    tasks = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return spec, {name.removeprefix("exec-"): config for name, config in tasks.items()}


def edited(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return path


def test_the_example_holds_every_key() -> None:
    mapping = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert {*mapping} == {*Profile.__dataclass_fields__} - {"development"}
    assert load(EXAMPLE).image == IMAGE


def test_every_task_runs_in_the_image_with_the_credentials(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec, tasks = compiled
    for executor in spec["deploymentSpec"]["executors"].values():
        assert executor["container"]["image"] == IMAGE
        names = {entry["name"]: entry["value"] for entry in executor["container"]["env"]}
        assert names["TMPDIR"] == "/scratch"
        assert names["SELECTMOE_MODEL_CACHE"] == "/models"
    for name, task in tasks.items():
        assert task["imagePullSecret"] == [
            {"secretName": "registry", "secretNameParameter": task["imagePullSecret"][0]["secretNameParameter"]}
        ]
        found = {s["secretName"]: s for s in task["secretAsEnv"]}
        assert {"s3-credentials", "mlflow-login", "model-hub"} <= {*found}
        assert found["model-hub"]["optional"] is True
        assert ("select-moe-webhook" in found) == (name == "finish")
        assert {v["mountPath"] for v in task["pvcMount"]} == {"/scratch", "/models"}
        assert task["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
        assert task["activeDeadlineSeconds"] in (str(86400), str(600), 86400, 600)
        assert task["fieldPathAsEnv"][0]["fieldPath"] == "metadata.labels['pipeline/runid']"
        assert task["securityContext"] == {"runAsNonRoot": True}


def test_only_tasks_that_use_an_accelerator_go_to_its_nodes(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, task in compiled[1].items():
        uses = name.rstrip("-0123456789") in ACCELERATED
        assert ("node.example.org/pool" in task["nodeSelector"]["labels"]) == uses
        assert ("nvidia.com/gpu" in {t.get("key") for t in task["tolerations"]}) == uses


def test_tasks_are_tried_again_with_growing_waits(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec, _ = compiled
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    executed = {
        name: task
        for dag in dags
        for name, task in dag["tasks"].items()
        if "executorLabel" in spec["components"][task["componentRef"]["name"]]
    }
    for name, task in executed.items():
        if name in ("gate", "finish"):
            assert "retryPolicy" not in task, "its answer would be the same"
        else:
            assert task["retryPolicy"]["maxRetryCount"] == 3
            assert task["retryPolicy"]["backoffDuration"] == "30s"


def test_parameters_have_the_sites_defaults(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters = compiled[0]["root"]["inputDefinitions"]["parameters"]
    assert parameters["work_root"]["defaultValue"] == "s3://select-moe/work"
    assert parameters["accelerator_count"]["defaultValue"] == 1.0
    assert parameters["preset"]["defaultValue"] == "quick"


def test_resources_of_the_profile_win(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    executors = compiled[0]["deploymentSpec"]["executors"]
    assert executors["exec-select"]["container"]["resources"]["resourceMemoryLimit"] == "32Gi"
    assert executors["exec-warmup"]["container"]["resources"]["resourceCpuLimit"] == "8"
    assert "inputs.parameters" in executors["exec-warmup"]["container"]["resources"]["resourceMemoryLimit"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"imag": "x"}, "unknown key imag"),
        ({"parameters": {"budgt": "5"}}, "parameters.budgt: no such parameter"),
        ({"parameters": {"memory": 64}}, "parameters.memory=64 must be str"),
        ({"retries": {"cuont": 3}}, "unknown key retries.cuont"),
        ({"secrets": [{"nam": "x", "env": {}}]}, "unknown key secrets[0].nam"),
        ({"secrets": [{"name": "x"}]}, "secrets[0].env is missing"),
        ({"secrets": {"name": "x"}}, "secrets={'name': 'x'} must be a list"),
        ({"ttl_seconds": "long"}, "ttl_seconds='long' must be int"),
        ({"timeouts": {"rout": 5}}, "timeouts.rout: no such stage"),
        ({"resources": {"warm": {}}}, "resources.warm: no such stage"),
        ({"retries": {"backoff": "30"}}, "retries.backoff=30 must be seconds"),
        ({"scratch": {"claim": "c", "mount": "tmp"}}, "scratch.mount=tmp must be an absolute path"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a credential"),
        ({"image": "select-moe:latest"}, "image=select-moe:latest can change under its name"),
    ],
)
def test_a_mistake_names_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    target = tmp_path / "out.yaml"
    assert main(["compile", f"profile={edited(tmp_path, **changes)}", f"output={target}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not target.exists()


def test_a_profile_that_is_no_yaml_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    with pytest.raises(UserError, match="No such file"):
        load(path)
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load(path)
    path.write_text("- a")
    with pytest.raises(UserError, match="the file must be a mapping"):
        load(path)


def test_an_image_by_tag_is_for_development(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path / 'p.yaml'}"
    assert main(["compile", "image=select-moe:0.1.0", output]) == 2
    assert "NAME@sha256:DIGEST" in capsys.readouterr().err
    assert main(["compile", "image=mine:dev", "development=true", output]) == 0
    assert "image: mine:dev" in (tmp_path / "p.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words", [[], ["dance"], ["compile", "x=1"], ["compile", "image"], ["compile", f"image={IMAGE}"]]
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("pipelines: ")
