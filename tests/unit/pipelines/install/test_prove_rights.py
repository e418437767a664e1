"""What a service account may do, asked of the stand-in for Kubernetes: `pytest tests/unit/pipelines/install/test_prove_rights.py`."""

from __future__ import annotations

import pytest

from pipelines.install.__main__ import main
from tests.kubernetes_server import KubernetesServer

CAN = "can=[get pods,create workflowtaskresults.argoproj.io,get pods/log,get secrets:select-moe-s3]"
RIGHTS = {CAN[5:-1].split(",")[n] for n in range(4)}


def rights(*words: str) -> int:
    return main(["prove", "what=rights", "namespace=ns", "wait=1", *words])


def test_as_they_must_be(cluster: KubernetesServer, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.rights = set(RIGHTS)
    assert rights(CAN, "cannot=[list secrets,create pods/exec]") == 0
    assert capsys.readouterr().out == "rights: as they must be in namespace ns: 4 given, 2 not\n"


def test_one_is_missing(cluster: KubernetesServer, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.rights = RIGHTS - {"get pods/log"}
    assert rights(CAN) == 3
    assert "may not get pods/log, and must" in capsys.readouterr().err.splitlines()[-1]


def test_one_too_many(cluster: KubernetesServer, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.rights = RIGHTS | {"list secrets"}
    assert rights(CAN, "cannot=[list secrets,create pods/exec]") == 3
    assert "it may list secrets, and must not" in capsys.readouterr().err


def test_one_that_comes_late(cluster: KubernetesServer) -> None:
    cluster.before["POST"] = lambda: (
        cluster.rights.clear() or cluster.before.update({"POST": lambda: cluster.rights.update(RIGHTS)})
    )
    assert rights(CAN) == 0


def test_a_server_that_is_away_says_nothing_about_rights(cluster: KubernetesServer) -> None:
    cluster.faults = [("POST", 503)] * 1000
    assert rights(CAN) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "can=[...] or cannot=[...] is needed"),
        (["can=[pods]"], "'pods' is no right"),
        (["can=get pods"], "must be a list"),
        (["what=everything"], "must be one of s3, mlflow, kfp, rights"),
    ],
)
def test_mistakes(cluster: KubernetesServer, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert rights(*words) == 2
    assert said in capsys.readouterr().err
