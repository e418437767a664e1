"""k8s/kind with real helm and kubectl: what kind-up installs fits what the chart renders. `pytest tests/chart/test_kind_cluster.py`."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from k8s import place, trial
from pipelines import profile

BIN = place.ROOT / ".venv" / "bin"
KINDS = ("1.33.0", "1.36.4")
"""The oldest Kubernetes that the chart is for, and that of k8s/kind/cluster.yaml."""


def said(*words: str) -> str:
    """What a program prints."""
    return subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=True).stdout


@functools.cache
def rendered() -> list[dict[str, Any]]:
    """The chart as `make kind-up` installs it."""
    values = ("--values", str(place.CHART / "values-kind.yaml"), "--set-string", "image.tag=kind-abab")
    text = said("helm", "template", place.RELEASE, str(place.CHART), "--namespace", place.NAMESPACE, *values)
    return [document for document in yaml.safe_load_all(text) if document]


def site() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((place.HERE / "site.yaml").read_text(encoding="utf-8")))


def named(kind: str, name: str) -> dict[str, Any]:
    return next(d for d in rendered() if d["kind"] == kind and d["metadata"]["name"] == name)


@pytest.mark.parametrize("version", KINDS)
def test_site_is_valid(version: str) -> None:
    for document in site():
        kubernetes_validate.validate(document, ".".join(version.split(".")[:2]), strict=True)


@pytest.mark.parametrize("component", ["mlflow", "seaweedfs"])
def test_the_ways_in_lead_to_the_chart_s_pods(component: str) -> None:
    workload = next(
        d
        for d in rendered()
        if d["kind"] in ("Deployment", "StatefulSet")
        and d["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == component
    )
    pod = workload["spec"]["template"]
    ports = {port["containerPort"] for c in pod["spec"]["containers"] for port in c["ports"]}
    selecting = [
        d
        for d in site()
        if (d["spec"].get("selector") or d["spec"].get("podSelector", {}).get("matchLabels", {})).get(
            "app.kubernetes.io/component"
        )
        == component
    ]
    assert [d["kind"] for d in selecting] == ["Service", "NetworkPolicy"]
    service, policy = selecting
    for selector in (service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]):
        assert selector.items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] in ports
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] in ports
    assert pod["spec"]["nodeSelector"] == {place.SERVICES: "true"}, "a drain of the other worker leaves it alone"


def test_the_ports_are_those_of_the_cluster() -> None:
    config = yaml.safe_load((place.HERE / "cluster.yaml").read_text(encoding="utf-8"))
    mapped = [entry for node in config["nodes"] for entry in node.get("extraPortMappings", [])]
    assert {entry["listenAddress"] for entry in mapped} == {"127.0.0.1"}
    node_ports = {d["spec"]["ports"][0]["nodePort"] for d in site() if d["kind"] == "Service"}
    assert {entry["containerPort"] for entry in mapped} == node_ports == set(place.PORTS.values())
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    assert [node.get("labels") for node in config["nodes"]] == [None, {place.SERVICES: "true"}, None]


def test_the_profile_is_one_that_the_pipeline_takes(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(named("ConfigMap", f"{place.RELEASE}-profile")["data"]["profile.yaml"], encoding="utf-8")
    found = profile.load(path)
    claim = next(d for d in site() if d["kind"] == "PersistentVolumeClaim")
    assert found.model_cache == profile.Volume(claim["metadata"]["name"], place.MOUNT)
    assert found.parameters["work_root"] == place.WORK_ROOT
    assert found.image == "select-moe:kind-abab"
    assert [secret.name for secret in found.secrets] == [f"{place.RELEASE}-s3"]
    assert named("ServiceAccount", f"{place.RELEASE}-pipeline")


def test_the_chart_s_tests_are_known_by_name() -> None:
    pods = [d for d in rendered() if d["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    components = {d["metadata"]["labels"]["app.kubernetes.io/component"] for d in pods if d["kind"] == "Pod"}
    assert components == set(trial.TESTS)


def test_the_models_lie_where_kind_up_makes_the_folder() -> None:
    volume, claim = (
        next(d for d in site() if d["kind"] == kind) for kind in ("PersistentVolume", "PersistentVolumeClaim")
    )
    assert volume["spec"]["hostPath"]["path"] == place.MODELS
    assert volume["spec"]["claimRef"] == {key: claim["metadata"][key] for key in ("namespace", "name")}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"]


BASE = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  selector: {matchLabels: {app: NAME}}
  template: {metadata: {labels: {app: NAME}}, spec: {containers: [{name: main, image: none}]}}
---
"""


def test_kfp_s_patches_apply(tmp_path: Path) -> None:
    """The overlay over a stand-in for KFP's own manifests, which cannot be fetched here."""
    base = tmp_path / "base"
    overlay = tmp_path / "kfp"
    base.mkdir()
    overlay.mkdir()
    names = ("ml-pipeline", "ml-pipeline-visualizationserver", "metadata-writer")
    text = "".join(BASE.replace("NAME", name) for name in names)
    text += (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: pipeline-install-config}\ndata: {bucketName: mlpipeline}\n"
    )
    (base / "all.yaml").write_text(text, encoding="utf-8")
    (base / "kustomization.yaml").write_text("resources: [all.yaml]\n", encoding="utf-8")
    own = (place.HERE / "kfp" / "kustomization.yaml").read_text(encoding="utf-8")
    assert len(re.findall(r"https://github\.com/\S+", own)) == 1
    (overlay / "kustomization.yaml").write_text(re.sub(r"https://github\.com/\S+", "../base", own), encoding="utf-8")
    found = {d["metadata"]["name"]: d for d in yaml.safe_load_all(said("kubectl", "kustomize", str(overlay)))}
    assert all(found[name]["spec"]["template"]["spec"]["nodeSelector"] == {place.SERVICES: "true"} for name in names)
    assert [found[name]["spec"].get("replicas", 1) for name in names] == [1, 0, 0]
    assert found["pipeline-install-config"]["data"]["defaultSecurityContextRunAsNonRoot"] == "true"
    assert found["pipeline-install-config"]["data"]["bucketName"] == "mlpipeline"


def test_kfp_is_one_version_that_goes_with_the_sdk() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (place.HERE / "kfp").rglob("kustomization.yaml")]
    versions = {version for text in texts for version in re.findall(r"\?ref=(\S+)", text)}
    lock = (place.ROOT / "requirements.lock").read_text(encoding="utf-8")
    sdk = re.search(r"^kfp==(\d+\.\d+)\.", lock, re.MULTILINE)
    assert sdk
    assert len(versions) == 1
    assert versions.pop().startswith(f"{sdk[1]}.")
