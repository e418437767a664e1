"""The chart's Secrets, against the stand-in for Kubernetes: `pytest tests/unit/pipelines/install/test_secrets.py`."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pipelines.install.__main__ import main
from tests.kubernetes_server import KubernetesServer

SPEC = """
secrets:
- name: s3
  labels: {app.kubernetes.io/part-of: select-moe}
  annotations: {helm.sh/resource-policy: keep}
  keys:
    s3.json: {seaweedfs: {access_key: id, secret_key: key}}
    id: {random: 20}
    key: {random: 40}
- name: login
  keys: {user: {value: admin}, password: {random: 24}}
"""


def ensure(tmp_path: Path, spec: str = SPEC, wait: int = 1) -> int:
    path = tmp_path / "secrets.yaml"
    path.write_text(spec)
    return main(["secrets", f"spec={path}", "namespace=ns", f"wait={wait}"])


def test_what_is_missing_is_made(cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ensure(tmp_path) == 0
    s3, login = cluster.texts("s3"), cluster.texts("login")
    assert (len(s3["id"]), len(s3["key"]), len(login["password"])) == (20, 40, 24)
    assert s3["key"].isalnum()
    assert s3["id"] != s3["key"][:20]
    assert login["user"] == "admin"
    (identity,) = json.loads(s3["s3.json"])["identities"]
    assert identity["credentials"] == [{"accessKey": s3["id"], "secretKey": s3["key"]}]
    assert "Write" in identity["actions"]
    metadata = cluster.secrets["ns/s3"]["metadata"]
    assert metadata["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert metadata["labels"] == {"app.kubernetes.io/part-of": "select-moe"}
    out, err = capsys.readouterr()
    assert "secret s3: made, with s3.json, id, key" in out
    assert not any(text in out + err for text in (s3["id"], s3["key"], login["password"])), "nothing secret is printed"


def test_what_is_there_is_never_changed(
    cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ensure(tmp_path) == 0
    before = dict(cluster.secrets)
    cluster.calls.clear()
    assert ensure(tmp_path) == 0
    assert cluster.secrets == before
    assert {call.split()[0] for call in cluster.calls} == {"GET"}, "not even the same is written again"
    assert "there already" in capsys.readouterr().out


def test_missing_keys_are_added_and_made_from_those_that_are_there(cluster: KubernetesServer, tmp_path: Path) -> None:
    cluster.put("s3", id="mine", other="untouched")
    assert ensure(tmp_path) == 0
    texts = cluster.texts("s3")
    assert texts["id"] == "mine"
    assert texts["other"] == "untouched"
    assert json.loads(texts["s3.json"])["identities"][0]["credentials"] == [
        {"accessKey": "mine", "secretKey": texts["key"]}
    ]


def test_a_key_that_was_changed_by_hand_is_pointed_out(
    cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ensure(tmp_path) == 0
    cluster.put("s3", **{**cluster.texts("s3"), "key": "rotated"})
    assert ensure(tmp_path) == 0
    assert cluster.texts("s3")["key"] == "rotated"
    assert "s3.json does not fit id and key any more; delete s3.json" in capsys.readouterr().err


def test_two_at_a_time_agree(cluster: KubernetesServer, tmp_path: Path) -> None:
    """Neither overwrites what the other made, whether the Secret is new or lacks keys."""
    for there in ({}, {"id": "mine"}):
        cluster.secrets.clear()
        if there:
            cluster.put("s3", **there)
        seen: list[dict[str, str]] = []

        def one(seen: list[dict[str, str]] = seen) -> None:
            assert ensure(tmp_path) == 0
            seen.append(cluster.texts("s3"))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 4
        assert all(texts == seen[0] for texts in seen)


def test_whoever_comes_second_keeps_what_the_first_made(cluster: KubernetesServer, tmp_path: Path) -> None:
    cluster.before["POST .*secrets$"] = lambda: cluster.put("s3", id="theirs", key="theirs too", s3_dot_json="{}")
    assert ensure(tmp_path) == 0
    assert cluster.texts("s3") == {"id": "theirs", "key": "theirs too", "s3.json": "{}"}
    cluster.secrets.clear()
    cluster.put("s3", id="mine")
    cluster.before["PATCH .*secrets/s3$"] = lambda: cluster.put("s3", id="mine", key="theirs")
    assert ensure(tmp_path) == 0
    assert cluster.texts("s3")["key"] == "theirs"


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "lose", 403])
def test_faults_are_tried_again(cluster: KubernetesServer, tmp_path: Path, fault: int | str) -> None:
    """An answer that was lost after the Secret was made included: the second attempt finds it."""
    cluster.faults = [("GET .*s3", fault), ("POST .*", fault), ("POST .*", fault)]
    assert ensure(tmp_path, wait=20) == 0
    assert {*cluster.texts("s3")} == {"id", "key", "s3.json"}


def test_a_right_that_is_missing(cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.faults = [("POST", 403)] * 1000
    assert ensure(tmp_path, wait=20) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "install secrets: creating secret s3: this service account may not (403): fault 403"


def test_an_immutable_secret(cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.put("s3", immutable=True, id="mine")
    assert ensure(tmp_path) == 2
    assert "adding to secret s3: the Kubernetes API refuses (422)" in capsys.readouterr().err


def test_nobody_answers(cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.close()
    assert ensure(tmp_path, wait=0) == 1
    assert "the Kubernetes API does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "must hold one list"),
        ("secrets: {}", "must hold one list"),
        ("secrets: [", "is not YAML"),
        ("secrets: [{name: x}]", "secrets[0] must have name and keys"),
        ("secrets: [{name: X, keys: {a: {random: 20}}}]", "secrets[0].name='X' is no name"),
        ("secrets: [{name: x, keys: {}}]", "secrets[0].keys must be a mapping"),
        ("secrets: [{name: x, keys: {a/b: {random: 20}}}]", "'a/b' is no key"),
        ("secrets: [{name: x, keys: {a: {random: 4}}}]", "secrets[0].keys.a must be one of"),
        ("secrets: [{name: x, keys: {a: secret}}]", "secrets[0].keys.a must be one of"),
        ("secrets: [{name: x, keys: {a: {seaweedfs: {access_key: b, secret_key: c}}}}]", "secrets[0].keys.a must be"),
    ],
)
def test_a_wrong_file(
    cluster: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: str, said: str
) -> None:
    assert ensure(tmp_path, spec) == 2
    assert said in capsys.readouterr().err
    assert not cluster.calls


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["secrets"]) == 2
    assert "missing: spec=" in capsys.readouterr().err
    assert main(["secrets", "spec=/nowhere", "namespace=ns"]) == 2
    assert "spec=/nowhere: No such file" in capsys.readouterr().err
    assert main(["secrets", f"spec={tmp_path}", "namespce=ns"]) == 2
    assert "unknown key 'namespce'; nearest: namespace" in capsys.readouterr().err
    assert main(["secrets", f"spec={tmp_path}", "wait=-1"]) == 2
    assert main(["secrts"]) == 2
    assert "there are: secrets, bucket" in capsys.readouterr().err
    assert main(["secrets", "--help"]) == main(["--help"]) == 0
