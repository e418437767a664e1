"""Images: the list for clusters without internet is whole, one registry can take all of them, digests stand beside tags.

.venv/bin/python -m pytest tests/chart/test_images.py
"""

from __future__ import annotations

import re

import chart
import pytest
import yaml
from chart import CHART, COMBINATIONS, Rendering, render
from manifests import pods, walk

METADATA = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
LISTED = {entry["name"]: entry["image"] for entry in yaml.safe_load(METADATA["annotations"]["artifacthub.io/images"])}
REFERENCE = re.compile(r"(?:(?P<registry>[^/]+)/)?(?P<path>[a-z0-9./_-]+):(?P<tag>[\w.-]+)(?:@sha256:[0-9a-f]{64})?")


def images(rendering: Rendering) -> set[str]:
    """Every image that a rendering makes somebody run, the pipeline's tasks included."""
    found = {container["image"] for pod in pods(rendering.docs) for container in pod.containers()}
    for doc in rendering.docs:
        for key, text in (doc.get("data") or {}).items() if doc["kind"] == "ConfigMap" else ():
            if key == "profile.yaml":
                found.add(yaml.safe_load(text)["image"])
    return found


def bare(image: str) -> str:
    """An image without digest and without Docker Hub's registry."""
    return image.partition("@")[0].removeprefix("docker.io/")


def test_the_chart_lists_exactly_the_images_that_it_can_render() -> None:
    own = [name for name in COMBINATIONS if "image" not in str(COMBINATIONS[name].get("values", {}))]
    found = {bare(image) for name in own if not COMBINATIONS[name].get("files") for image in images(render(name))}
    assert found == {bare(image) for image in LISTED.values()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_image_has_a_fixed_tag(name: str) -> None:
    for image in images(render(name)):
        match = REFERENCE.fullmatch(image)
        assert match, image
        assert match["tag"] != "latest"


@pytest.mark.parametrize("name", ["mirror", "airgapped", "production-airgapped"])
def test_with_a_registry_of_its_own_nothing_comes_from_elsewhere(name: str) -> None:
    rendering = render(name)
    registry = rendering.values["global"]["imageRegistry"]
    assert images(rendering)
    for image in images(rendering):
        assert image.startswith(registry + "/"), image
    for doc in rendering.docs:
        for path, value in walk(doc):
            assert not isinstance(value, str) or not re.search(
                r"docker\.io|ghcr\.io|quay\.io|gcr\.io|huggingface\.co", value
            ), path
    for pod in pods(rendering.docs):
        assert pod.spec["imagePullSecrets"] == [
            {"name": name} for name in rendering.values["global"]["imagePullSecrets"]
        ]


def test_a_digest_stands_beside_the_tag_everywhere() -> None:
    for name in ("digests", "gpu-site"):
        rendering = render(name)
        for image in images(rendering):
            assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image) or "seaweedfs" in image, image


def test_production_comes_with_digests_only() -> None:
    for image in images(render("production")):
        assert "@sha256:" in image


def test_the_chart_says_what_artifact_hub_and_helm_want_to_know() -> None:
    notes = METADATA["annotations"]
    assert METADATA["apiVersion"] == "v2"
    assert METADATA["kubeVersion"] == ">=1.33.0-0"
    assert re.fullmatch(r"\d+\.\d+\.\d+", METADATA["version"])
    for key in ("description", "appVersion", "keywords", "type"):
        assert METADATA[key], key
    for key in ("license", "category", "images", "changes"):
        assert notes[f"artifacthub.io/{key}"], key
    for entry in yaml.safe_load(notes["artifacthub.io/changes"]):
        assert entry["kind"] in ("added", "changed", "deprecated", "removed", "fixed", "security")
        assert entry["description"]
    for key, value in notes.items():
        assert isinstance(value, str), key
    assert not METADATA.get("dependencies"), "no charts of third parties"
    assert chart.defaults()["image"]["tag"] == ""
