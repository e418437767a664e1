"""`python -m pipelines submit` against a stand-in for the KFP server: `pytest tests/unit/pipelines/test_submit.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import follow, kfp_api, submit
from pipelines.__main__ import ROOT
from selectmoe.errors import Refused, UserError
from tests.kfp_server import KfpServer, node

ENVIRONMENT = (kfp_api.ENDPOINT, kfp_api.TOKEN, "KUBERNETES_SERVICE_HOST", "KF_PIPELINES_UI_ENDPOINT")

WORK = "work_root=s3://bucket/work"


@pytest.fixture(scope="session")
def pipeline() -> submit.Compiled:
    return submit.compiled()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, pipeline: submit.Compiled) -> Iterator[KfpServer]:
    """A stand-in, and a client that does not wait between attempts."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kfp_api, "DELAYS", (0.01,) * 5)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "compiled", lambda *_: pipeline)
    with KfpServer() as running:
        monkeypatch.setenv(kfp_api.ENDPOINT, running.url)
        yield running


def main(words: list[str]) -> int:
    """The command, with the one parameter that a run must have."""
    own = any(word.startswith(("run_id=", "work_root=", "--help")) for word in words)
    return submit.main(words if own else [*words, WORK])


def failing(*nodes: Any) -> list[Any]:
    return [("RUNNING", [node("check", "SUCCEEDED")]), ("FAILED", list(nodes))]


def test_a_run_is_started_and_followed(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset=tiny", "run_name=first"]) == 0
    out, err = capsys.readouterr()
    (run,) = server.runs
    assert out == f"{run.run_id}\n"
    assert f"{server.url}/#/runs/details/{run.run_id}" in err
    assert "check  0/" in err
    assert run.display_name == "first"
    assert run.runtime_config.parameters == {"preset": "tiny", "work_root": "s3://bucket/work"}


def test_the_same_pipeline_is_uploaded_once(server: KfpServer, pipeline: submit.Compiled) -> None:
    assert main(["wait=false"]) == main(["wait=false"]) == 0
    (version,) = server.versions
    assert version.display_name == pipeline.version
    assert len(server.runs) == 2
    assert server.calls.count("POST /pipelines/upload_version") == 1


def test_types_are_those_of_the_compiled_pipeline(server: KfpServer) -> None:
    assert main(["wait=false", "config=['arms=[a,b]','k=2']", "budget=0.05", "shards=3"]) == 0
    assert server.runs[0].runtime_config.parameters == {
        "config": ["arms=[a,b]", "k=2"],
        "budget": "0.05",
        "shards": 3,
        "work_root": "s3://bucket/work",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prest=tiny"], "no parameter 'prest'; nearest: preset"),
        (["config=tiny"], "config=tiny must be a list"),
        (["shards=two"], "shards=two must be a whole number"),
        (["tiny"], "'tiny' is not of the form key=value"),
        (["--force"], "'--force' is not of the form key=value"),
        (["wait=perhaps"], "wait=perhaps must be true or false"),
        (["data=s3://me:pass@host/x"], "data= looks like a credential"),
        (["config=['s3_secret_key=x']"], "config= looks like a credential"),
        (["experiment=nowhere"], "there is no experiment 'nowhere'"),
        (["run_id=1", "preset=tiny"], "leave out preset"),
        (["run_id=1"], "not found"),
        (["token_file=/nowhere/token"], "token_file=/nowhere/token cannot be read"),
        (["ca_file=/nowhere/ca"], "ca_file=/nowhere/ca is no file"),
        (["endpoint=localhost:8888"], "endpoint= takes http://HOST"),
        (["endpoint=http://me:pass@host"], "endpoint= looks like a credential"),
    ],
)
def test_mistakes_of_the_user(
    server: KfpServer, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not server.runs


def test_the_types_that_our_pipeline_does_not_have() -> None:
    known = {
        "n": {"parameterType": "NUMBER_INTEGER"},
        "x": {"parameterType": "NUMBER_DOUBLE", "isOptional": True},
        "s": {"parameterType": "STRUCT", "defaultValue": {}},
    }
    assert submit.parse(["n=3", "x=1e-4", "s={a:1}"], known)[1] == {"n": 3, "x": 1e-4, "s": {"a": 1}}
    for words in (["n=3.5"], ["n=true"], ["n=1", "x=inf"], ["n=1", "x=nan"], ["n=1", "s=[1]"], ["n=["]):
        with pytest.raises(UserError, match="must be"):
            submit.parse(words, known)
    with pytest.raises(UserError, match="the pipeline needs n="):
        submit.parse(["x=1"], known)


def test_an_experiment_is_made_on_demand(server: KfpServer) -> None:
    assert main(["wait=false", "experiment=new", "create_experiment=true"]) == 0
    assert [item.display_name for item in server.experiments] == ["Default", "new"]
    assert server.runs[0].experiment_id == server.experiments[1].experiment_id


def test_a_profile_makes_another_version(pipeline: submit.Compiled, tmp_path: Path) -> None:
    image = "registry.example.org/select-moe@sha256:" + "0" * 64
    (tmp_path / "site.yaml").write_text(f"image: {image}\n")
    other = submit.compiled(str(tmp_path / "site.yaml"))
    assert image.encode() in other.text
    assert other.version != pipeline.version


def test_a_word_of_both_kinds_counts_twice() -> None:
    known = {"experiment": {"parameterType": "STRING", "defaultValue": ""}}
    options, parameters = submit.parse(["experiment=e"], known)
    assert (options.experiment, parameters) == ("e", {"experiment": "e"})
    assert submit.parse([], known)[1] == {}


def test_dry_run_sends_nothing(
    server: KfpServer, capsys: pytest.CaptureFixture[str], pipeline: submit.Compiled
) -> None:
    assert main(["--dry-run", "preset=tiny", "service_account=runner"]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert sent["run"]["runtime_config"] == {"parameters": {"preset": "tiny", "work_root": "s3://bucket/work"}}
    assert sent["run"]["service_account"] == "runner"
    assert sent["upload_unless_there"]["name"] == pipeline.version
    assert server.calls == []


def test_the_tasks_of_the_compiled_pipeline(pipeline: submit.Compiled) -> None:
    known = follow.tasks(pipeline.spec)
    assert known["check"] is known["report"] is known["route"] is False
    assert known["pretrain"] is known["upcycle"] is True
    assert "chain" not in known


def test_help_lists_options_and_parameters(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert {"  create_experiment", "  preset", "  run_id"} <= set(out.splitlines())


def test_a_token_from_the_environment_or_a_file(
    server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.token = "right-token"
    assert main(["wait=false"]) == 2
    monkeypatch.setenv(kfp_api.TOKEN, "wrong-token")
    assert main(["wait=false"]) == 2
    err = capsys.readouterr().err
    assert err.count("wants to know who you are (answer 401): set KF_PIPELINES_TOKEN or token_file=FILE") == 2
    assert "wrong-token" not in err
    (tmp_path / "token").write_text("right-token\n")
    assert main(["wait=false", f"token_file={tmp_path / 'token'}"]) == 0
    monkeypatch.setenv(kfp_api.TOKEN, "right-token")
    assert main(["wait=false"]) == 0
    assert "right-token" not in "".join(capsys.readouterr())


def test_in_a_pod(server: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.token, server.namespaces = "pod-token", ("team-a",)
    (tmp_path / "token").write_text("pod-token")
    (tmp_path / "namespace").write_text("team-a")
    monkeypatch.delenv(kfp_api.ENDPOINT)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(kfp_api, "NAMESPACE_FILE", tmp_path / "namespace")
    assert kfp_api.find_endpoint("") == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    monkeypatch.setattr(kfp_api, "IN_CLUSTER", server.url)
    assert main(["wait=false"]) == 0
    assert server.pipelines[0].namespace == "team-a"


def test_namespaces(server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server.namespaces = ("team-a",)
    monkeypatch.setattr(kfp_api, "NAMESPACE_FILE", Path("/nowhere"))
    assert main(["wait=false"]) == 2
    assert "namespace= is needed" in capsys.readouterr().err
    assert main(["wait=false", "namespace=team-b"]) == 2
    assert "you may not do that in namespace team-b (answer 403)" in capsys.readouterr().err
    assert main(["wait=false", "namespace=team-a"]) == 0


def test_without_an_endpoint(server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv(kfp_api.ENDPOINT)
    assert main([]) == 2
    assert "endpoint= (or KF_PIPELINES_ENDPOINT) is needed" in capsys.readouterr().err


def test_nobody_there(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["endpoint=http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9: no answer (NewConnectionError), 6 times in a row" in capsys.readouterr().err


@pytest.mark.parametrize(("fault", "said"), [("html", "is no Kubeflow Pipelines API"), ("login", "(answer 302)")])
def test_another_server(server: KfpServer, capsys: pytest.CaptureFixture[str], fault: str, said: str) -> None:
    server.faults = [("healthz", fault)]
    assert main([]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", [503, 429, "drop", "lose"])
def test_a_server_that_is_away_for_a_while(server: KfpServer, what: int | str) -> None:
    calls = ["healthz", "GET /experiments", "POST /pipelines$", "GET .*/versions", "upload", "POST /runs", "GET /runs/"]
    server.faults = [(call, what) for call in calls for _ in range(3)]
    assert main([]) == 0
    assert (len(server.runs), len(server.pipelines), len(server.versions)) == (1, 1, 1)


def test_a_server_that_stays_away(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = [("GET /pipelines", 500)] * 6
    assert main([]) == 1
    assert "answer 500: fault 500, 6 times in a row" in capsys.readouterr().err


def test_a_lost_answer_does_not_start_a_second_run(server: KfpServer) -> None:
    server.faults = [("POST /runs", "lose")]
    assert main(["run_name=mine"]) == main(["run_name=mine"]) == 0
    assert len(server.runs) == 2


def test_somebody_else_uploads_meanwhile(server: KfpServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["wait=false"]) == 0
    seen: list[int] = []
    listing = server._list_versions
    monkeypatch.setattr(server, "_list_versions", lambda *a, **k: (seen.append(1), _late(listing, seen, *a, **k))[1])
    assert main(["wait=false"]) == 0
    assert (len(server.versions), len(server.runs), len(seen)) == (1, 2, 2)
    monkeypatch.setattr(server, "_list_versions", lambda *a, **k: _late(listing, [1], *a, **k))
    assert main(["wait=false"]) == 2
    assert "the name is taken where you may not see it" in capsys.readouterr().err


def _late(listing: Any, seen: list[int], *args: Any, **kwargs: Any) -> Any:
    """The list of versions, of which the first look sees nothing."""
    found = listing(*args, **kwargs)
    if len(seen) == 1:
        found.pipeline_versions = None
    return found


def test_a_failed_task_is_named_with_its_message(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = failing(
        node("check", "SUCCEEDED"),
        node("chain", "FAILED", "child failed"),
        node("warmup", "FAILED", children=["pod-1"]),
        node("executor", "FAILED", "OOMKilled (exit code 137)", pod="pod-1"),
    )
    assert main([]) == 1
    assert "pipelines submit: warmup failed: OOMKilled (exit code 137) (" in capsys.readouterr().err


def test_a_task_that_could_not_start_is_named(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = failing(node("ingest-driver", "FAILED", "secret s3 not found"), node("ingest", "SKIPPED"))
    assert main([]) == 1
    assert "ingest failed: secret s3 not found" in capsys.readouterr().err


def test_a_run_that_fails_as_a_whole(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = failing(node("root-driver", "FAILED", "no such bucket"))
    assert main([]) == 1
    assert "root failed: no such bucket" in capsys.readouterr().err
    server.script = [("FAILED", [])]
    assert main([]) == 1
    assert "the run failed before any task" in capsys.readouterr().err


def test_a_cancelled_run(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = [("RUNNING", []), ("CANCELING", []), ("CANCELED", [])]
    assert main([]) == 1
    assert "the run was canceled" in capsys.readouterr().err


@pytest.mark.parametrize(("message", "code"), [("", 3), ("Error (exit code 1)", 3), ("OOMKilled (exit code 137)", 1)])
def test_the_gate(message: str, code: int) -> None:
    known = {"check": False, "gate": False}
    run = _run("FAILED", [node("gate", "FAILED", message)])
    with pytest.raises(Refused if code == 3 else follow.RunFailed, match="gate"):
        follow._judge(run, known, "http://x")
    with pytest.raises(follow.RunFailed, match="check failed: no; gate failed"):
        follow._judge(_run("FAILED", [node("check", "FAILED", "no"), *run.run_details.task_details]), known, "http://x")


def test_the_gate_is_exit_code_3(server: KfpServer, monkeypatch: Any, capsys: Any) -> None:
    server.script = failing(node("report", "FAILED", "not convincing"))
    monkeypatch.setattr(follow, "GATE", "report")
    assert main([]) == 3
    assert "the gate said no: not convincing" in capsys.readouterr().err


def _run(state: str, details: list[Any]) -> Any:
    import kfp_server_api as api

    return api.V2beta1Run(state=state, run_details=api.V2beta1RunDetails(task_details=details))


def test_following_survives_a_lost_connection(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wait=false"]) == 0
    run_id = capsys.readouterr().out.strip()
    server.script = [("RUNNING", [node("route", "RUNNING"), node("route", "RUNNING")])] * 2 + [("SUCCEEDED", [])]
    server.faults = [("healthz", "drop"), ("GET /runs/", "drop")]
    read = server._get_run
    server._get_run = lambda *a, **k: (server.faults.extend([("GET /runs/", "drop")] * 9), read(*a, **k))[1]  # type: ignore
    assert main([f"run_id={run_id}"]) == 0
    err = capsys.readouterr().err
    assert "trying again" in err
    assert "route x2" in err
    assert len(server.runs) == 1


def test_progress_counts_tasks_and_not_nodes() -> None:
    loop = {"step-2": {"componentRef": {"name": "c"}}}
    branch = {"step-3": {"componentRef": {"name": "c"}}}
    root = {
        "step": {"componentRef": {"name": "c"}},
        "for-loop-1": {"componentRef": {"name": "loop"}},
        "condition-1": {"componentRef": {"name": "branch"}, "triggerPolicy": {"condition": "a == b"}},
    }
    components = {"c": {"executorLabel": "x"}, "loop": {"dag": {"tasks": loop}}, "branch": {"dag": {"tasks": branch}}}
    known = follow.tasks({"components": components, "root": {"dag": {"tasks": root}}})
    assert known == {"step": False, "step-2": False, "step-3": True}
    run = _run("RUNNING", [node("step", "SUCCEEDED"), node("step-driver", "SUCCEEDED"), node("executor", "SUCCEEDED")])
    assert follow.progress(run, known) == follow.Progress((), 1, 2)
    run.run_details.task_details += [
        node("step-2", "RUNNING"),
        node("step-2", "RUNNING"),
        node("for-loop-1", "RUNNING"),
    ]
    assert follow.progress(run, known).line(3725) == "step-2 x2  1/3 tasks  1:02:05"


def test_interrupted_the_run_goes_on(server: KfpServer) -> None:
    server.script = [("RUNNING", [node("check", "RUNNING")])]
    command = [sys.executable, "-m", "pipelines", "submit", f"endpoint={server.url}", WORK]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore SIGINT, and their children inherit that.
    streams["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams)  # type: ignore
    assert process.stdout
    assert process.stderr
    run_id = process.stdout.readline().strip()
    while "check" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"python -m pipelines submit endpoint={server.url} run_id={run_id}"
    assert f"the run goes on; follow it again: {again}" in err
    assert "Traceback" not in err
    assert server.runs[0].state == "RUNNING"
