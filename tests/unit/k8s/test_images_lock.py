"""k8s/images.py against a stand-in that speaks the registries' protocol: `pytest tests/unit/k8s/test_images_lock.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from k8s import images
from k8s.images import Image
from tests.serving import Quiet, Stand

INDEX = json.dumps({"schemaVersion": 2, "mediaType": images.ACCEPT.split(", ")[0], "manifests": []}).encode()
DIGEST = "sha256:" + hashlib.sha256(INDEX).hexdigest()


class Registry:
    """A stand-in registry: tokens without an account, manifests by tag, faults on demand."""

    def __init__(self) -> None:
        self.manifests = {("chrislusf/seaweedfs", "4.17"): INDEX, ("library/alone", "1"): INDEX}
        self.calls: list[str] = []
        self.faults: list[int] = []
        self.says = ""
        self.challenge = 'Bearer realm="{url}/token",service="registry",scope="repository:{name}:pull"'
        self.stand = Stand(self._handler())
        self.host = self.stand.url.removeprefix("http://")

    def _handler(registry) -> type[BaseHTTPRequestHandler]:
        class Handler(Quiet):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                registry.calls.append(self.path)
                if registry.faults:
                    self._send(registry.faults.pop(0), b"")
                elif url.path == "/token":
                    asked = {key: values[0] for key, values in parse_qs(url.query).items()}
                    assert asked["service"] == "registry"
                    self._send(200, json.dumps({"token": f"for {asked['scope']}"}).encode())
                else:
                    name, tag = url.path.removeprefix("/v2/").split("/manifests/")
                    self._manifest(name, tag)

            def _manifest(self, name: str, tag: str) -> None:
                if self.headers.get("Authorization") != f"Bearer for repository:{name}:pull":
                    challenge = registry.challenge.format(url=registry.stand.url, name=name)
                    self._send(401, b"", {"WWW-Authenticate": challenge})
                    return
                assert "image.index" in self.headers["Accept"]
                found = registry.manifests.get((name, tag))
                if found is None:
                    self._send(404, b"{}")
                    return
                said = registry.says or "sha256:" + hashlib.sha256(found).hexdigest()
                self._send(200, found, {"Docker-Content-Digest": said})

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

        return Handler


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(images, "DELAYS", (0.0, 0.0, 0.0))
    found = Registry()
    yield found
    found.stand.close()


@pytest.fixture
def chart(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(images, "CHART", tmp_path)
    (tmp_path / "Chart.yaml").write_text('appVersion: "0.1.0"\n', encoding="utf-8")
    (tmp_path / "values.yaml").write_text(
        f"""# a comment that stays
objectStorage:
  seaweedfs:
    image:
      registry: "{registry.host}"
      repository: chrislusf/seaweedfs   # where it is
      tag: "4.17"
      digest: ""  # filled by make images-lock
mlflow: {{enabled: true}}
""",
        encoding="utf-8",
    )
    (tmp_path / "values-production.yaml").write_text(
        "objectStorage:\n  seaweedfs:\n    image:\n      digest:\n", encoding="utf-8"
    )
    return tmp_path


def test_digests_are_written_and_nothing_else_changes(chart: Path, registry: Registry) -> None:
    before = (chart / "values.yaml").read_text()
    assert images.main([]) == 0
    after = (chart / "values.yaml").read_text()
    assert after == before.replace('digest: ""', f'digest: "{DIGEST}"')
    production = yaml.safe_load((chart / "values-production.yaml").read_text())
    assert production["objectStorage"]["seaweedfs"]["image"]["digest"] == DIGEST
    assert len([call for call in registry.calls if call.startswith("/token")]) == 1, "an image is asked for once"
    assert images.main(["check=true"]) == 0


def test_check_says_what_would_change_and_writes_nothing(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (chart / "values.yaml").read_text()
    assert images.main(["check=true"]) == 3
    assert (chart / "values.yaml").read_text() == before
    assert DIGEST in capsys.readouterr().out


def test_an_image_that_is_not_there_does_not_stop_the_others(
    chart: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f'image: {{registry: "{registry.host}", repository: select-moe, tag: "", digest: ""}}\n'
    values = chart / "values.yaml"
    values.write_text(own + values.read_text(), encoding="utf-8")
    assert images.main([f"file={values}"]) == 1
    found = yaml.safe_load(values.read_text())
    assert found["image"]["digest"] == ""
    assert found["objectStorage"]["seaweedfs"]["image"]["digest"] == DIGEST
    said = capsys.readouterr().err
    assert "image: " in said
    assert "select-moe:0.1.0: not there, or not for everybody (answer 404)" in said


def test_a_busy_registry_is_asked_again(chart: Path, registry: Registry) -> None:
    registry.faults = [429, 503]
    assert images.main([]) == 0


def test_a_registry_that_stays_away_is_said(
    chart: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.faults = [503] * 99
    assert images.main([]) == 1
    assert "answer 503, 4 times" in capsys.readouterr().err


def test_what_a_registry_says_of_its_bytes_is_not_believed(chart: Path, registry: Registry) -> None:
    registry.says = "sha256:" + "0" * 64
    assert images.main([]) == 1
    assert "0000" not in (chart / "values.yaml").read_text()


def test_a_registry_that_wants_a_password_is_missing(registry: Registry) -> None:
    registry.challenge = 'Basic realm="here"'
    with pytest.raises(images.Missing, match="wants a login"):
        images.digest(Image(registry.host, "chrislusf/seaweedfs", "4.17"))


def test_a_token_is_fetched_by_https_only() -> None:
    challenge = 'Bearer realm="http://elsewhere.example/token",service="x"'
    with pytest.raises(images.Unavailable, match="no https"):
        images._token(Image("registry.example.org", "a/b", "1"), challenge)


@pytest.mark.parametrize(
    ("registry", "repository", "expected"),
    [
        ("", "alone", "https://registry-1.docker.io/v2/library/alone"),
        ("docker.io", "chrislusf/seaweedfs", "https://registry-1.docker.io/v2/chrislusf/seaweedfs"),
        ("ghcr.io", "kubeflow/kfp-driver", "https://ghcr.io/v2/kubeflow/kfp-driver"),
        ("", "registry.example.org:5000/a/b", "https://registry.example.org:5000/v2/a/b"),
        ("localhost:5000", "a", "http://localhost:5000/v2/a"),
    ],
)
def test_where_an_image_is_asked_for(registry: str, repository: str, expected: str) -> None:
    image = Image.of(registry, repository, "1")
    assert f"{image.base}/v2/{image.repository}" == expected


@pytest.mark.parametrize("word", ["file", "check=maybe", "file=", "nonsense=1", "file=not-there.yaml"])
def test_words_that_are_not_understood(word: str) -> None:
    assert images.main([word]) == 2
