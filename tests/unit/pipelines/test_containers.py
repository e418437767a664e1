"""pytest tests/unit/pipelines/test_containers.py"""

import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest

from pipelines import containers, local
from selectmoe.errors import UserError


class Engine:
    """A client of an engine: an image's program answers with a text, or it ends with an error."""

    def __init__(self, answer):
        self.answer, self.images, self.containers = answer, self, self

    def get(self, name):
        if name != "select-moe:dev":
            raise docker.errors.ImageNotFound(name)

    def run(self, image, command, **how):
        if isinstance(self.answer, Exception):
            raise self.answer
        return subprocess.run([sys.executable, *command[1:]], stdout=subprocess.PIPE).stdout + self.answer


@pytest.fixture
def engine(monkeypatch):
    def answers(text):
        monkeypatch.setattr(docker, "from_env", lambda: Engine(text))

    answers(b"")
    return answers


def test_runner_and_image_belong_together(engine):
    image = "select-moe:dev"
    assert local._image(["preset=tiny"]) == ("", ["preset=tiny"])
    assert local._image(["runner=process", "seeds=3"]) == ("", ["seeds=3"])
    assert local._image(["runner=docker", "preset=tiny", f"image={image}"]) == (image, ["preset=tiny"])
    for wrong in (["runner=docker"], [f"image={image}"], ["runner=podman", f"image={image}"]):
        with pytest.raises(UserError, match="runner=docker image=NAME"):
            local._image(wrong)


def test_an_engine_that_does_not_answer_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="no container engine answers") as error:
        containers.prove("select-moe:dev")
    assert "\n" not in str(error.value)


def test_an_image_that_is_not_there_or_holds_something_else_is_said(engine):
    with pytest.raises(UserError, match="image=other is not here: run `make image`"):
        containers.prove("other")
    engine(b"0")
    with pytest.raises(UserError, match="image=select-moe:dev was built from other code"):
        containers.prove("select-moe:dev")
    engine(docker.errors.ContainerError("x", 1, ["python"], "select-moe:dev", b"No module named components"))
    with pytest.raises(UserError, match=r"no image of Select-MoE .*No module named components"):
        containers.prove("select-moe:dev")


@pytest.fixture
def folder(tmp_path):
    for name in ("state/work", "state/models", "rows", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "state/events").touch()
    return tmp_path


def test_a_task_is_restricted_and_sees_what_it_needs(folder, monkeypatch):
    state = folder / "state"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", str(folder / "models"))
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    read = [str(folder / "rows"), str(folder / "model"), str(state / "work/made"), ""]
    (state / "work/made").mkdir()
    found = containers.places(state, str(state / "work"), str(state / "models"), read, state / "events")
    given = containers.runner("select-moe:dev", found).container_run_args
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges"]
    assert given["user"].split(":")[0] not in ("0", "root", "")
    written = [m["Target"] for m in given["mounts"] if not m["ReadOnly"]]
    assert written == [str(state / name) for name in ("work", "models", "events")]
    assert [m["Source"] for m in given["mounts"] if m["ReadOnly"]] == [str(folder / n) for n in ("model", "rows")]
    assert given["environment"]["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert given["environment"].keys().isdisjoint({"PYTHONPATH", "SELECTMOE_MODEL_CACHE"})


def test_what_comes_from_elsewhere_goes_through_the_model_cache(folder, monkeypatch):
    state, models = folder / "state", str(folder / "cache")
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", models)
    found = containers.places(state, "s3://bucket/work", str(state / "models"), [], state / "events")
    assert found.written == (state / "models", Path(models), state / "events")
    assert (
        containers.runner("select-moe:dev", found).container_run_args["environment"]["SELECTMOE_MODEL_CACHE"] == models
    )
    found = containers.places(
        state, str(state / "work"), str(state / "models"), ["s3://bucket/model"], state / "events"
    )
    assert (Path(models) in found.written, found.read) == (True, ())


def test_the_tasks_may_write_what_they_are_to_and_nobody_else_may(folder):
    """Root's containers are somebody else, to whom it is handed; anybody else's are themselves, and nothing changes."""
    root = os.getuid() == 0
    group, modes = (containers.USER, (0o2775, 0o664)) if root else (os.getgid(), (0o755, 0o644))
    work = folder / "state/work"
    (work / "old").mkdir(mode=0o755)
    (work / "old/file").touch(mode=0o644)
    before = os.umask(0o022)
    try:
        containers.share((work, folder / "new", folder / "state/events"))
        (work / "old/later").mkdir()
        (work / "old/later/file").touch()
    finally:
        os.umask(before)
    for path in (work, work / "old", work / "old/later", folder / "new"):
        assert (path.stat().st_gid, path.stat().st_mode & 0o7777) == (group, modes[0])
    for path in (work / "old/file", work / "old/later/file", folder / "state/events"):
        assert (path.stat().st_gid, path.stat().st_mode & 0o7777) == (group, modes[1])
    assert folder.stat().st_gid != containers.USER
