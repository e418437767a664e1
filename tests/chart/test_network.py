"""Who reaches whom through the rendered NetworkPolicies, as a table: what has to work, and what must not.

.venv/bin/python -m pytest tests/chart/test_network.py
"""

from __future__ import annotations

from urllib.parse import urlsplit

import network
import pytest
from chart import COMBINATIONS, Rendering, render
from manifests import pods
from network import End, allows, end

API = End(address="10.0.0.1")
WITH = [
    name for name in COMBINATIONS if COMBINATIONS[name].get("values", {}).get("networkPolicy") != {"enabled": False}
]


def ends(rendering: Rendering) -> dict[str, End]:
    """The pods of a rendering by their component, and a pod of the pipeline."""
    found = {pod.labels["app.kubernetes.io/component"]: end(pod) for pod in pods(rendering.docs)}
    task = network.pipeline(rendering.docs)
    return found | ({"task": task} if task else {})


def s3(rendering: Rendering) -> tuple[End, int]:
    """The object storage of a rendering, and its port."""
    storage = rendering.values["objectStorage"]
    if storage["seaweedfs"]["enabled"]:
        return ends(rendering)["seaweedfs"], 8333
    url = urlsplit(storage["external"]["endpoint"])
    return network.OUTSIDE, url.port or (443 if url.scheme == "https" else 80)


def flows(rendering: Rendering) -> list[tuple[str, End, int]]:
    """What has to work: component, server, port."""
    values, own = rendering.values, ends(rendering)
    wanted = [(client, *s3(rendering)) for client in ("mlflow", "bucket", "test-s3", "task")]
    wanted += [(client, API, 6443) for client in ("secrets", "test-rights")]
    if "mlflow" in own:
        wanted += [(client, own["mlflow"], 5000) for client in ("task", "retention", "test-mlflow")]
        if values["mlflow"]["database"]["type"] == "postgresql":
            server = End(address="192.0.2.5")
            port = values["mlflow"]["database"]["postgresql"]["port"]
            wanted += [(client, server, port) for client in ("mlflow", "retention")]
    url = urlsplit(values["kfp"]["endpoint"])
    is_inside = not values["networkPolicy"]["kfp"]["to"] or url.hostname.endswith(".kubeflow")
    labels = {"app": "ml-pipeline"}
    server = End(labels, namespace=values["kfp"]["namespace"]) if is_inside else network.OUTSIDE
    port = url.port or (443 if url.scheme == "https" else 80)
    wanted += [(client, server, port) for client in ("upload", "run", "test-kfp")]
    return [(client, server, port) for client, server, port in wanted if client in own]


@pytest.mark.parametrize("name", WITH)
def test_what_has_to_work_works(name: str) -> None:
    rendering = render(name)
    wanted = flows(rendering)
    assert wanted
    for client, server, port in wanted:
        assert allows(rendering.docs, ends(rendering)[client], server, port, here=rendering.namespace), (
            f"{client} does not reach {server}:{port}"
        )


@pytest.mark.parametrize("name", WITH)
def test_nothing_else_does(name: str) -> None:
    rendering = render(name)
    own = ends(rendering)
    for client in own:
        if client != "task":
            assert not allows(rendering.docs, own[client], network.OUTSIDE, 22), f"{client} reaches port 22 anywhere"
            assert not allows(rendering.docs, own[client], network.STRANGERS["any pod of the cluster"], 9999)
        if client not in ("mlflow", "bucket", "test-s3", "task") and "seaweedfs" in own:
            assert not allows(rendering.docs, own[client], own["seaweedfs"], 8333), f"{client} reaches SeaweedFS"
    if "seaweedfs" in own:
        for port in (9333, 8080, 8888, 18888):
            assert not allows(rendering.docs, own["mlflow" if "mlflow" in own else "bucket"], own["seaweedfs"], port)
        assert not allows(rendering.docs, own["seaweedfs"], network.OUTSIDE, 443), "SeaweedFS calls out"
    if "task" in own:
        for stranger in network.STRANGERS.values():
            assert not allows(rendering.docs, stranger, own["task"], 29500), "a task is called from outside"


def test_kubeflow_pipelines_may_ask_mlflow_unless_it_may_not() -> None:
    for name, is_allowed in (("defaults", True), ("network-peers", False)):
        rendering = render(name)
        server = End({"app": "ml-pipeline"}, namespace="kubeflow")
        assert allows(rendering.docs, server, ends(rendering)["mlflow"], 5000) is is_allowed


def test_named_peers_are_the_only_ones() -> None:
    rendering = render("network-peers")
    own = ends(rendering)
    assert allows(rendering.docs, End({"app": "notebook"}), own["seaweedfs"], 8333)
    assert allows(rendering.docs, End(namespace="ingress"), own["mlflow"], 5000)
    assert not allows(rendering.docs, own["mlflow"], End(address="192.0.2.99"), 6432)
    assert not allows(rendering.docs, own["secrets"], End(address="10.0.1.1"), 6443)
    assert not allows(rendering.docs, own["secrets"], API, 443)
    assert not allows(rendering.docs, own["mlflow"], network.OUTSIDE, 53, "UDP")
    assert not allows(rendering.docs, own["upload"], End({"app": "minio"}, namespace="kubeflow"), 8888)
