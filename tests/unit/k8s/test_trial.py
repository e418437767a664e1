"""k8s/trial.py and `make kind-run` against stand-ins for the cluster and a real S3 server: `pytest tests/unit/k8s/test_trial.py`.

The stand-in for KFP's API (tests/kfp_server.py) executes nothing; here it pretends to: the first run in a `work_root`
executes every task, a later one only `check`; a run that is struck fails, as KFP 2.17 lets it, or goes on.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import kind, place, trial
from k8s.tools import Tools
from pipelines import follow, submit
from selectmoe.errors import Refused, Unavailable, UserError
from selectmoe.storage import open_store
from tests.kfp_server import KfpServer, node
from tests.serving import S3Server
from tests.unit.k8s.world import World

PROFILE = "image: select-moe:kind-abab\ndevelopment: true\nparameters: {work_root: s3://select-moe/work, memory: 3Gi}\n"
TASKS = ("check", "ingest", "pretrain", "convert", "verify", "warmup", "route", "merge", "select", "report", "gate")
COMPILED: dict[str, submit.Compiled] = {}


class Pretending(KfpServer):
    """KFP as far as `make kind-test` sees it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.known: set[str] = set()
        """The `work_root`s in which everything was done once."""
        self.gives_up = 1
        """How many of the runs that are struck end as failed."""
        self.identity: Callable[[str], str] = lambda root: "1d"
        self.forgets = False
        """Whether nothing comes from the cache."""
        self.hides = False
        """Whether executors are listed in a form that is not known here."""
        self.anonymous = False
        """Whether nodes do not say which pod they are."""
        self.too_quick = False
        """Whether a run is over before anybody sees it."""
        self.polls: dict[str, int] = {}
        self.work: dict[str, tuple[str, ...]] = {}

    def _create_run(self, body: bytes, **more: Any) -> Any:
        made = super()._create_run(body, **more)
        root = self._root(made)
        self.work[made.run_id] = TASKS if root not in self.known or self.forgets else ("check",)
        pod = {
            "metadata": {
                "name": f"{made.run_id}-impl",
                "annotations": {trial.NODE_NAME: "x.root.chain.warmup.executor"},
            },
            "spec": {"nodeName": "select-moe-worker2"},
            "status": {"containerStatuses": [{"name": "main", "state": {"running": {}}}]},
        }
        driver = {"metadata": {"name": "driver", "annotations": {trial.NODE_NAME: "x.root.chain.warmup-driver"}}}
        if len(self.work[made.run_id]) > 1:
            self.world["pods"] = self.world["pods"] | {made.run_id: [driver, pod]}
        return made

    def _root(self, run: Any) -> str:
        return str(run.runtime_config.parameters.get("work_root", "s3://select-moe/work"))

    def _get_run(self, run_id: str, **_: Any) -> Any:
        run = next(item for item in self.runs if item.run_id == run_id)
        self.polls[run_id] = self.polls.get(run_id, 0) + 1
        struck = any(run_id in " ".join(c) for c in self.world.called("kubectl", "delete", "pod"))
        struck = struck or (bool(self.world.called("kubectl", "drain")) and self._root(run).endswith("drained"))
        if run.state in ("SUCCEEDED", "FAILED"):
            return run
        if self.polls[run_id] < 3 and not struck and not self.too_quick:
            run.state = "RUNNING"
        elif struck and self.gives_up and self.work[run_id] == TASKS and self._root(run) not in self.known:
            self.gives_up -= 1
            run.state = "FAILED"
            self.known.add(self._root(run))  # what was committed is found again
            self.work[run_id] = ("check", "warmup")
        else:
            run.state = "SUCCEEDED"
            self._end(run)
        run.run_details = details(run.state, self.work[run_id], self.hides, self.anonymous)
        return run

    def _end(self, run: Any) -> None:
        root = self._root(run)
        self.known.add(root)
        noted = {
            "tasks": dict.fromkeys(self.work[run.run_id], 1),
            "verdict": "no evidence",
            "report": "minio://mlpipeline/report",
            "identity": self.identity(root),
        }
        open_store(f"{root}/runs").put_bytes(f"{run.run_id}.json", json.dumps(noted).encode())


def details(state: str, executed: tuple[str, ...], hides: bool = False, anonymous: bool = False) -> Any:
    """A run's nodes as KFP lists them: a driver, a task, and the executor inside it, skipped where the cache had it."""
    import kfp_server_api as api

    nodes = []
    for task in (*TASKS, "finish"):
        inner = "SUCCEEDED" if task in (*executed, "finish") else "SKIPPED"
        child, attempt = f"{task}-inner", f"{task}-attempt"
        nodes += [node(f"{task}-driver", "SUCCEEDED"), node(task, "SUCCEEDED", pod=task, children=[child])]
        nodes.append(node("main" if hides else "executor", inner, pod="" if anonymous else child, children=[attempt]))
        if inner == "SUCCEEDED":
            nodes.append(node("executor(0)", inner, pod="" if anonymous else attempt))
    if state == "FAILED":
        nodes.append(node("warmup", "FAILED", "pod deleted"))
    return api.V2beta1RunDetails(task_details=nodes)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"), "select-moe")
    yield server
    server.close()


@pytest.fixture
def kfp(world: World, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretending]:
    keys = {"AWS_ACCESS_KEY_ID": s3.KEY, "AWS_SECRET_ACCESS_KEY": s3.SECRET}
    coded = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
    world["answers"] = {
        "configmap/select-moe-profile": {"data": {"profile.yaml": PROFILE}},
        "secret/select-moe-s3": {"data": coded},
    }
    monkeypatch.setattr(trial, "POLL", 0.05)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    plain = submit.compiled

    def once(profile: str) -> submit.Compiled:
        text = Path(profile).read_text(encoding="utf-8")
        if text not in COMPILED:
            COMPILED[text] = plain(profile)
        return COMPILED[text]

    monkeypatch.setattr(submit, "compiled", once)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    world.up()
    with Pretending(world) as server:
        yield server


@pytest.fixture
def here(kfp: Pretending, s3: S3Server, world: World, tmp_path: Path) -> tuple[Tools, place.Place]:
    """The programs, and a place whose ports are those of the stand-ins."""
    config = yaml.safe_load((place.HERE / "cluster.yaml").read_text(encoding="utf-8"))
    ports = {30888: kfp.url, 30833: s3.url}
    for entry in config["nodes"][0]["extraPortMappings"]:
        entry["hostPort"] = int(ports.get(entry["containerPort"], ":1").rpartition(":")[2])
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    found = place.Place(world.state / "kind", tmp_path / "cluster.yaml")
    return Tools(("kind", "kubectl", "helm"), found.kubeconfig), found


def test_everything_holds(
    here: tuple[Tools, place.Place], kfp: Pretending, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trial.test(*here, "tiny") == 0
    said = capsys.readouterr().out
    assert "everything holds; the report's identity is 1d" in said
    assert "KFP gave the run up: warmup failed: pod deleted" in said
    assert "the same report after 2 submissions" in said
    assert world.called("helm", "test", "select-moe")
    parameters = [run.runtime_config.parameters for run in kfp.runs]
    assert all(entry["preset"] == "tiny" for entry in parameters)
    assert all(entry["config"] == ["demo_dir=/models/demo"] for entry in parameters)
    roots = [entry["work_root"].rpartition("/")[2] for entry in parameters]
    assert roots == ["reference", "reference", "deleted", "deleted", "drained"]
    assert {run.service_account for run in kfp.runs} == {"select-moe-pipeline"}
    assert len(kfp.versions) == 1, "the pipeline is uploaded once"
    executor = kfp.versions[0].pipeline_spec["pipeline_spec"]["deploymentSpec"]["executors"]["exec-check"]
    assert executor["container"]["image"] == "select-moe:kind-abab", "the chart's profile"


def test_the_logs_of_the_chart_s_failed_tests_are_kept(
    here: tuple[Tools, place.Place], kfp: Pretending, world: World
) -> None:
    world["faults"] = {"helm test": "Error: pod select-moe-test-s3 failed"}
    with pytest.raises(Unavailable, match="pod select-moe-test-s3 failed"):
        trial.test(*here, "tiny")
    assert "test-s3, test-mlflow" in " ".join(world.called("kubectl", "logs")[0])
    assert not kfp.runs


def test_a_drain_moves_tasks_only_and_leaves_no_node_cordoned(
    here: tuple[Tools, place.Place], kfp: Pretending, world: World
) -> None:
    assert trial.test(*here, "tiny") == 0
    assert [call[2] for call in world.called("kubectl", "drain")] == ["select-moe-worker2"]
    assert not any(node["cordoned"] for node in world.nodes().values())
    order = [call[1:3] for call in world["calls"] if call[1] in ("cordon", "uncordon", "drain")]
    assert order[:4] == [
        ["cordon", "select-moe-worker"],
        ["uncordon", "select-moe-worker"],
        ["drain", "select-moe-worker2"],
        ["uncordon", "select-moe-worker2"],
    ], "tasks go to the worker that is drained, and from there to the other one"


def test_no_node_stays_cordoned_when_the_drain_fails(
    here: tuple[Tools, place.Place], kfp: Pretending, world: World
) -> None:
    world["faults"] = {"kubectl drain": "error: unable to drain node: timeout"}
    with pytest.raises(Unavailable, match="unable to drain"):
        trial.test(*here, "tiny")
    assert not any(node["cordoned"] for node in world.nodes().values())


def test_a_second_run_that_executes_something_is_refused(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.forgets = True
    with pytest.raises(Refused, match=r"the second run executed .*'warmup': 1"):
        trial.test(*here, "tiny")


def test_nodes_without_a_pod_s_name_are_counted(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.anonymous = True
    assert trial.test(*here, "tiny") == 0
    (first, again, *_) = kfp.runs
    runs = trial.Runs(*here)
    assert runs.executed(first.run_id) == {trial.UNNAMED: len(TASKS) + 1}
    assert runs.executed(again.run_id) == {trial.UNNAMED: 2}


def test_nodes_without_a_pod_s_name_hide_nothing(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.anonymous = kfp.forgets = True
    with pytest.raises(Refused, match="the second run executed"):
        trial.test(*here, "tiny")


def test_a_listing_that_cannot_be_read_proves_nothing(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.hides = True
    with pytest.raises(Refused, match=r"KFP's API says that \{\} were executed, the tasks noted \{'check': 1"):
        trial.test(*here, "tiny")


def test_another_report_after_a_deleted_pod_is_refused(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.identity = lambda root: "1d" if root.endswith("reference") else "other"
    with pytest.raises(Refused, match="identity is other, that of the reference 1d"):
        trial.test(*here, "tiny")


def test_a_run_that_ends_before_it_can_be_struck_is_said(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    kfp.too_quick = True
    created = kfp._create_run

    def without_pods(body: bytes, **more: Any) -> Any:
        made = created(body, **more)
        kfp.world["pods"] = {}
        return made

    kfp._create_run = without_pods  # type: ignore[method-assign]
    with pytest.raises(Refused, match="ended before warmup, route, finetune were seen at work"):
        trial.test(*here, "tiny")


def test_a_cluster_of_another_shape_is_not_drained(
    here: tuple[Tools, place.Place], kfp: Pretending, world: World
) -> None:
    clusters = world["clusters"]
    del clusters["select-moe"]["nodes"]["select-moe-worker2"]
    world["clusters"] = clusters
    with pytest.raises(UserError, match="make kind-down kind-up"):
        trial.test(*here, "tiny")


def test_run_follows_and_says_what_came_of_it(
    here: tuple[Tools, place.Place], kfp: Pretending, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind.run(*here, {"preset": "quick", "seeds": "3"}) == 0
    said = capsys.readouterr().out
    assert "verdict: no evidence" in said
    assert "identity 1d" in said
    (run,) = kfp.runs
    assert run.runtime_config.parameters == {
        "preset": "quick",
        "seeds": 3,
        "shards": 2,
        "config": ["demo_dir=/models/demo"],
    }
    capsys.readouterr()
    assert kind.run(*here, {"preset": "quick", "seeds": "3"}) == 0
    assert "executed: check\n" in capsys.readouterr().out


def test_run_says_a_mistake_before_it_starts_anything(here: tuple[Tools, place.Place], kfp: Pretending) -> None:
    with pytest.raises(UserError, match="no parameter 'presets'"):
        kind.run(*here, {"presets": "quick"})
    assert not kfp.runs


def test_run_without_the_chart(here: tuple[Tools, place.Place], world: World) -> None:
    world["releases"] = {}
    with pytest.raises(UserError, match=r"no ConfigMap select-moe-profile in kubeflow\): make kind-up"):
        kind.run(*here, {})
