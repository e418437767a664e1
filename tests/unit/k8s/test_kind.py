"""k8s/kind.py with stand-ins for docker, podman, kind, kubectl and helm: `pytest tests/unit/k8s/test_kind.py`."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from k8s import kind, place, tools
from tests.unit.k8s import stand_in
from tests.unit.k8s.world import World

TAG = "docker.io/library/select-moe:kind-" + "ab" * 6


def test_up_from_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert kind.main(["up"]) == 0
    cluster = world["clusters"]["select-moe"]
    assert list(cluster["nodes"]) == ["select-moe-control-plane", "select-moe-worker", "select-moe-worker2"]
    assert cluster["provider"] == "docker"
    for name, node in list(cluster["nodes"].items())[1:]:
        assert node["images"] == [TAG], name
        assert f"{place.MODELS}/demo/quick" in node["files"]
    assert world["releases"] == {"select-moe": {"namespace": "kubeflow", "set": "image.tag=kind-abababababab"}}
    assert [Path(path).relative_to(kind.HERE).as_posix() for path in world["applied"]] == [
        "kfp/crds",
        "kfp",
        "site.yaml",
    ]
    said = capsys.readouterr().out
    for port in (30880, 30888, 30500, 30833):
        assert f"http://127.0.0.1:{port}" in said
    assert not (world.state / "kind" / "image.tar").exists()


def test_up_again_makes_nothing_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert kind.main(["up"]) == 0
    world["calls"] = []
    assert kind.main(["up"]) == 0
    for words in (("kind", "create"), ("docker", "save"), ("kind", "load"), ("docker", "cp"), ("kubectl", "annotate")):
        assert not world.called(*words)
    assert [Path(path).name for path in world["applied"]].count("kfp") == 1
    assert len(world.called("helm", "upgrade", "--install")) == 1, "the chart is brought up to date"
    assert "there already" in capsys.readouterr().out


def test_up_starts_a_cluster_that_was_stopped(world: World) -> None:
    world.up()
    clusters = world["clusters"]
    for node in clusters["select-moe"]["nodes"].values():
        node["up"] = False
    world["clusters"] = clusters
    assert kind.main(["run"]) == 2, "it does not answer"
    assert kind.main(["up"]) == 0
    assert all(node["up"] for node in world.nodes().values())


def test_up_goes_on_where_it_was_ended(world: World) -> None:
    world["faults"] = {"helm upgrade": "Error: UPGRADE FAILED: timed out waiting for the condition"}
    assert kind.main(["up"]) == 1
    world["faults"] = {}
    world["calls"] = []
    assert kind.main(["up"]) == 0
    assert not world.called("kind", "create")
    assert not world.called("kind", "load")


def test_another_image_is_loaded_and_rolled_out(world: World) -> None:
    world.up()
    world["images"] = world["images"] | {"mine:1": "sha256:" + "cd" * 32}
    assert kind.main(["up", "image=mine:1"]) == 0
    assert world["releases"]["select-moe"]["set"] == "image.tag=kind-cdcdcdcdcdcd"
    other = "docker.io/library/select-moe:kind-cdcdcdcdcdcd"
    assert all(node["images"] == [other] for name, node in world.nodes().items() if "worker" in name)
    assert not world.called("docker", "build")
    assert kind.main(["up", "image=not-here"]) == 2


def test_a_new_version_of_kfp_is_applied(world: World) -> None:
    world.up()
    world["namespaces"] = {"kubeflow": {kind.MARK: "of another version"}}
    assert kind.main(["up"]) == 0
    assert [Path(path).name for path in world["applied"]].count("kfp") == 1
    assert world["namespaces"]["kubeflow"][kind.MARK] != "of another version"


@pytest.mark.parametrize("how", ["CONTAINER_ENGINE", "KIND_EXPERIMENTAL_PROVIDER", "alone", "as docker"])
def test_podman(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how in ("alone", "as docker"):
        (world.bin / "docker").unlink()
    else:
        monkeypatch.setenv(how, "podman")
    if how == "as docker":  # the package podman-docker
        (world.bin / "docker").write_text(f'#!/bin/sh\nexec "{world.bin}/podman" "$@"\n', encoding="utf-8")
        (world.bin / "docker").chmod(0o755)
    stand_in.install(world.bin, "podman")
    (world.state / "kind").mkdir(parents=True)
    (world.state / "kind" / "image.tar").write_text("left by a run that was killed", encoding="utf-8")
    assert kind.main(["up"]) == 0
    assert world["clusters"]["select-moe"]["provider"] == "podman"
    assert world.called("podman", "build")
    assert world.called("podman", "save", "--format", "docker-archive")
    assert all(node["images"] == [TAG] for name, node in world.nodes().items() if "worker" in name)
    assert kind.main(["down"]) == 0


def test_down_removes_it_and_can_be_said_twice(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.up()
    assert kind.main(["down"]) == 0
    assert world["clusters"] == {}
    assert not (world.state / "kind" / "kubeconfig").exists()
    assert (world.state / "demo" / "quick").is_dir()
    assert kind.main(["down"]) == 0
    assert "nothing was up" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "test", "logs"])
def test_without_a_cluster_the_next_command_is_said(
    world: World, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert kind.main([command]) == 2
    assert "make kind-up" in capsys.readouterr().err


def test_what_is_missing_or_too_old_is_said_at_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.bin / "kind").unlink()
    (world.bin / "docker").unlink()
    world["versions"] = world["versions"] | {"kubectl": "1.28.3", "helm": "3.12.0"}
    assert kind.main(["up"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for part in (
        "neither docker nor podman is installed: docker 23.0 or later (https://docs.docker.com/engine/install/), or podman",
        "kind is not installed: kind 0.33.0 or later (https://kind.sigs.k8s.io/",
        "1.28.3: kubectl 1.35 or later (https://kubernetes.io/docs/tasks/tools/) is needed",
        "3.12.0: helm 3.17 or later (https://helm.sh/docs/intro/install/) is needed",
    ):
        assert part in said
    assert world["clusters"] == {}


def test_a_daemon_that_does_not_answer(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world["faults"] = {"docker version": "Cannot connect to the Docker daemon"}
    assert kind.main(["down"]) == 2
    assert "is its daemon up, and may you use it?" in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_made(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world["machine"] = [4, 6 * 2**30]
    assert kind.main(["up"]) == 2
    assert "6.0 GiB of memory here, 12 GiB are needed" in capsys.readouterr().err
    assert not world.called("kind", "create")


def test_the_failure_of_one_thing_ends_the_others(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world["faults"] = {"kind create": "ERROR: failed to create cluster: no space left on device"}
    assert kind.main(["up"]) == 1
    said = capsys.readouterr().err
    assert "no space left on device" in said
    assert "cluster.log" in said
    assert not world["releases"]


def test_a_quarter_of_the_memory_is_reserved_on_each_node(world: World) -> None:
    assert kind.main(["up"]) == 0
    config = yaml.safe_load(world["clusters"]["select-moe"]["config"])
    reserved = [yaml.safe_load(patch)["systemReserved"] for patch in config["kubeadmConfigPatches"][1:]]
    assert reserved == [{"memory": f"{4 * 1024}Mi"}]


@pytest.mark.parametrize(
    "words", [[], ["upp"], ["up", "images=x"], ["down", "now=true"], ["test", "preset"], ["logs", "folder=x"]]
)
def test_words_that_are_not_understood(world: World, words: list[str]) -> None:
    assert kind.main(words) == 2


def test_logs_hold_no_secret_and_go_on_without_what_fails(world: World, tmp_path: Path) -> None:
    world.up()
    (world.state / "kind" / "logs").mkdir()
    (world.state / "kind" / "logs" / "chart.log").write_text("what helm said", encoding="utf-8")
    world["faults"] = {"kubectl describe": "error: the server could not find the requested resource"}
    assert kind.main(["logs", f"output={tmp_path / 'logs'}"]) == 0
    names = {
        path.relative_to(tmp_path / "logs").as_posix() for path in (tmp_path / "logs").rglob("*") if path.is_file()
    }
    assert {"events.txt", "workflows.yaml", "helm-values.yaml", "make/chart.log"} <= names
    assert "could not find" in (tmp_path / "logs" / "pods.txt").read_text()
    assert world.called("kind", "export", "logs")
    for call in world["calls"]:
        assert not (call[:2] == ["kubectl", "get"] and "secret" in call[2].lower())


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = (place.HERE / "cluster.yaml").read_text(encoding="utf-8")
        port = taken.getsockname()[1]
        (tmp_path / "cluster.yaml").write_text(text.replace("hostPort: 30500", f"hostPort: {port}"), encoding="utf-8")
        found = place.Place(tmp_path, tmp_path / "cluster.yaml")
        assert found.address("mlflow") == f"http://127.0.0.1:{port}"
        with pytest.raises(tools.UserError, match=rf"port {port} \(for mlflow\)"):
            found.check_ports()
