"""k8s/: the plain manifests are the chart's, kubectl builds base and overlays, and the result keeps the chart's rules.

.venv/bin/python -m pytest tests/chart/test_kustomize.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chart
import pytest
import rules
import schemas
import yaml
from chart import CHART, KUBECTL, ROOT
from manifests import Doc, annotations, parse, pods, title

from k8s import render

FOLDERS = {"base": [], **{f"overlays/{name}": [file] for name, file in render.OVERLAYS.items()}}


def built(folder: str) -> list[Doc]:
    """What kubectl makes of a folder of k8s/."""
    return parse(chart.run(KUBECTL, "kustomize", str(ROOT / "k8s" / folder)).stdout)


def by_title(docs: list[Doc]) -> dict[str, Doc]:
    return {title(doc): doc for doc in docs}


def values(files: list[Path]) -> Any:
    """The chart's values with k8s/values.yaml and further files over them."""
    merged = chart.defaults()
    for file in (ROOT / "k8s" / "values.yaml", *files):
        merged = chart.merged(merged, yaml.safe_load(file.read_text(encoding="utf-8")))
    return merged


def test_what_is_committed_is_what_the_chart_renders() -> None:
    for path, text in render.everything().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)} is stale: python -m k8s.render"


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_builds_what_the_chart_gives_for_these_values(folder: str) -> None:
    wanted = by_title(render.render([ROOT / "k8s" / "values.yaml", *FOLDERS[folder]]))
    assert by_title(built(folder)) == wanted


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_keeps_the_chart_s_rules_and_kubernetes_takes_it(folder: str) -> None:
    docs = built(folder)
    assert not list(rules.findings(docs, values(FOLDERS[folder]), render.NAMESPACE, is_release=False))
    assert not list(schemas.findings(docs))


def test_nothing_of_helm_is_left_and_the_hooks_are_jobs() -> None:
    docs = built("base")
    for doc in docs:
        for where in (doc, *(pod.template for pod in pods([doc]))):
            assert not [key for key in annotations(where) if key.startswith("helm.sh/")]
            assert where["metadata"]["labels"].get("app.kubernetes.io/managed-by", "kustomize") == "kustomize"
    jobs = {doc["metadata"]["name"] for doc in docs if doc["kind"] == "Job"}
    assert jobs == {"select-moe-secrets", "select-moe-bucket", "select-moe-upload"}


def test_manifests_of_one_s_own_values(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("image: {registry: registry.example.org}\npipeline: {scratch: {enabled: true}}\n")
    assert render.main([f"values={mine}", "namespace=team", f"output={tmp_path / 'out'}"]) == 0
    docs = parse(chart.run(KUBECTL, "kustomize", str(tmp_path / "out")).stdout)
    assert {doc["metadata"]["namespace"] for doc in docs} == {"team"}
    assert "PersistentVolumeClaim/select-moe-scratch" in by_title(docs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["value=x"], "'value=x' is not understood"),
        (["values=x.yaml"], "output= is missing"),
        (["values=nowhere.yaml", "output=out"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert render.main(words) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_values_that_the_chart_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("mlflow: {replicas: 2}\n")
    assert render.main([f"values={tmp_path / 'bad.yaml'}", f"output={tmp_path / 'out'}"]) == 2
    assert "1 with SQLite" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": True}, [("replace", "/a")]),
        ({"a": {"b/c": 1}}, {"a": {}}, [("remove", "/a/b~1c")]),
        ({"a": [1, {"b": 1}]}, {"a": [1, {"b": 2}]}, [("replace", "/a/1/b")]),
        ({"a": [1]}, {"a": [1, 2], "c": 3}, [("replace", "/a"), ("add", "/c")]),
    ],
)
def test_the_steps_between_two_objects(old: Doc, new: Doc, steps: list[tuple[str, str]]) -> None:
    assert [(step["op"], step["path"]) for step in render.difference(old, new)] == steps


def test_an_object_that_an_overlay_takes_away_and_one_that_it_adds() -> None:
    one, two = ({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}} for name in "ab")
    files = render.overlay([one], [two])
    assert yaml.safe_load(files["added.yaml"]) == two
    (patch,) = yaml.safe_load(files["kustomization.yaml"])["patches"]
    assert patch["target"] == {"kind": "ConfigMap", "name": "a"}
    assert yaml.safe_load(patch["patch"])["$patch"] == "delete"


def test_the_gpu_overlay_puts_accelerated_tasks_where_the_gpus_are() -> None:
    site = yaml.safe_load(
        by_title(built("overlays/gpu-cluster"))["ConfigMap/select-moe-profile"]["data"]["profile.yaml"]
    )
    assert site["parameters"]["accelerator_type"] == "nvidia.com/gpu"
    assert site["accelerator_tolerations"][0]["key"] == "nvidia.com/gpu"
    assert site["queue"]
    assert CHART.exists()


def test_the_readme_names_what_there_is() -> None:
    text = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")
    known = {doc["metadata"]["name"] for doc in built("base") if doc["kind"] == "Job"}
    assert set(re.findall(r"\bjob/([a-z0-9-]+)", text)) == known
    for folder in set(re.findall(r"-k (k8s/\S+)", text)) | set(
        re.findall(r"`((?:overlays|kind|base)/[\w/.-]*)`", text)
    ):
        path = ROOT / (folder if folder.startswith("k8s/") else f"k8s/{folder}")
        assert path.exists(), folder
