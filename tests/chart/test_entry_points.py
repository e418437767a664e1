"""What the chart's Jobs, tests and init containers run: words that the project's commands take, files and variables that they need.

.venv/bin/python -m pytest tests/chart/test_entry_points.py
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

import pytest
from chart import COMBINATIONS, render
from manifests import Doc, Pod, pods

from pipelines.install import __main__ as install
from pipelines.install.options import read

S3 = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"}
NEEDS = {
    "bucket": S3,
    "prove what=s3": S3,
    "prove what=mlflow": {"MLFLOW_TRACKING_URI"},
    "database": {"MLFLOW_BACKEND_STORE_URI"},
    "retention": {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_TRACKING_URI"},
}
"""Command -> environment variables without which it is of no use."""


def commands(name: str) -> Iterator[tuple[Pod, Doc, list[str]]]:
    """Pod, container and words of every command of the project in a rendering."""
    for pod in pods(render(name).docs):
        for container in pod.containers():
            if container.get("command") == ["python", "-m", "pipelines.install"]:
                yield pod, container, container["args"]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_words_are_understood(name: str) -> None:
    found = list(commands(name))
    assert found
    for _, _, (command, *words) in found:
        assert command in install.COMMANDS
        read(importlib.import_module(f"pipelines.install.{command}").Options, words)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_files_are_mounted_and_the_variables_set(name: str) -> None:
    workload_identity = render(name).values["objectStorage"]["external"]["workloadIdentity"]
    for pod, container, words in commands(name):
        mounts = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
        for path in re.findall(r"=(/(?:etc|var)/\S+)", " ".join(words)):
            assert any(path == mount or path.startswith(mount + "/") for mount in mounts), f"{pod.title}: {path}"
        given = {variable["name"] for variable in container.get("env") or []}
        text = " ".join(words)
        for command, needed in NEEDS.items():
            if text.startswith(command):
                wanted = needed - {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} if workload_identity else needed
                assert not wanted - given, f"{pod.title}: {command} has no {wanted - given}"


def test_every_command_is_used_by_some_combination() -> None:
    used = {words[0] for name in COMBINATIONS for _, _, words in commands(name)}
    assert used == set(install.COMMANDS)
    proved = {words[1] for name in COMBINATIONS for _, _, words in commands(name) if words[0] == "prove"}
    assert proved == {"what=s3", "what=mlflow", "what=kfp", "what=rights"}
