"""pytest tests/unit/image/test_build.py"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from image import build

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client that writes down how it was called, and what the page of links says."""
    path = tmp_path / "client"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, urllib.request\n"
        "links = [a.split('=', 1)[1] for a in sys.argv if a.startswith('TORCH_WHEELS=')]\n"
        "page = urllib.request.urlopen(links[0]).read().decode() if links else ''\n"
        f"json.dump([sys.argv[1:], page], open({str(tmp_path / 'called')!r}, 'w'))\n"
        "sys.exit(7)\n"
    )
    path.chmod(0o755)
    for name in ("PIP_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONTAINER_ENGINE", str(path))

    def call(*arguments):
        assert build.main(list(arguments)) == 7, "the engine's exit code"
        return json.loads((tmp_path / "called").read_text())

    return call


def test_without_anything_special_nothing_special_is_asked_for(client):
    words, _ = client()
    assert words[:6] == ["build", "--target", "cpu", "--tag", "select-moe:dev", "--build-arg"]
    assert "VERSION=0.1.0" in words
    assert not any(word.startswith(("BASE=", "TORCH_WHEELS=", "PIP_", "SOURCE=")) for word in words)
    assert "--network" not in words
    assert words[-1] == str(ROOT)


def test_index_and_wheels_of_the_machine_reach_the_build(client, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-py3-none-any.whl").touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example.org/simple")
    words, page = client("--base", "registry.example.org/python:3.11")
    assert "torch-2.13.0%2Bcpu-py3-none-any.whl" in page
    assert {"BASE=registry.example.org/python:3.11", "PIP_INDEX_URL=https://index.example.org/simple"} <= set(words)
    assert words[words.index("--network") + 1] == "host"
    address = next(word.split("=", 1)[1] for word in words if word.startswith("TORCH_WHEELS="))
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)

    words, _ = client("--target", "gpu")
    assert not any(word.startswith("TORCH_WHEELS=") for word in words), "the index's own build"


def test_no_engine_is_said(monkeypatch):
    monkeypatch.delenv("CONTAINER_ENGINE", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="neither docker nor podman"):
        build.engine()


def test_the_dockerfile_and_the_shell_scripts_are_clean():
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("image/*.sh"), ROOT / ".ci/run"]
    for command in ([BIN / "hadolint", ROOT / "Dockerfile"], [BIN / "shellcheck", *scripts]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
