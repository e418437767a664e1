"""What only a cluster can prove: `make kind-test`, that is `python -m k8s.kind test [preset=tiny]`.

1. `helm test`: S3, MLflow, KFP and the service account's rights, from inside.
2. The pipeline end to end, in a `work_root` of its own, so that KFP's cache knows nothing of it.
3. The same again: only `check` and `finish` are executed. KFP's API says so, and so do the tasks' own notes.
4. A pod is deleted in mid-stage, as a node that is lost would do it: the report has the same identity.
5. A worker is drained in mid-stage: the same.

KFP 2.17 does not start a deleted pod's task again, whatever the retries are (Argo takes it for an error, and retries
failures only), so a run may end as failed in 4 and 5. Then the same parameters are submitted again, as a person would:
what was committed is not done twice, and what comes of it must be the same bytes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from k8s import place as site
from k8s.place import CLUSTER, MOUNT, NAMESPACE, RELEASE, SERVICES, Place
from k8s.tools import Tools
from selectmoe.errors import Refused, Unavailable, UserError

EXPERIMENT = "kind"
ALWAYS = {"check", "finish"}
"""Tasks that are never cached."""
LONG = ("warmup", "route", "finetune")
"""Stages that last long enough to be interrupted, and commit on the way."""
AGAIN = 3
"""How often a run that was interrupted may be submitted."""
POLL = 0.5
TESTS = ("test-s3", "test-mlflow", "test-kfp", "test-rights")
"""The chart's tests, by their component's name."""


@dataclass(frozen=True)
class Pod:
    """A pod of a task that is at work."""

    name: str
    node: str
    task: str


class Runs:
    """Runs of the pipeline with the chart's profile, through `pipelines/submit.py`.

    Args:
        tools: the programs.
        place: the cluster's addresses.
    """

    def __init__(self, tools: Tools, place: Place) -> None:
        from pipelines.kfp_api import Server
        from pipelines.submit import compiled

        self.tools = tools
        self.profile = str(site.profile(tools, place))
        os.environ["KF_PIPELINES_UI_ENDPOINT"] = place.address("ui")
        os.environ.update(site.s3_environment(tools, place))
        self.endpoint = place.address("api")
        self.server = Server(self.endpoint)
        self.pipeline = compiled(self.profile)

    def start(self, given: Mapping[str, str]) -> str:
        """Start a run; returns its ID.

        Args:
            given: words of `python -m pipelines submit`, which win over ours.

        Raises:
            UserError: a word is wrong.
        """
        from pipelines.submit import parse, submit

        own = {
            "endpoint": self.endpoint,
            "profile": self.profile,
            "experiment": EXPERIMENT,
            "create_experiment": "true",
            "service_account": f"{RELEASE}-pipeline",
            "config": f'["demo_dir={MOUNT}/demo"]',
        }
        options, parameters = parse(
            [f"{key}={value}" for key, value in (own | dict(given)).items()], self.pipeline.parameters
        )
        run_id = submit(options, self.pipeline, parameters, self.server)
        print(f"run: {self.server.link(run_id)}", flush=True)
        return run_id

    def follow(self, run_id: str) -> Exception | None:
        """Wait for a run's end; returns what is wrong with it."""
        from pipelines.follow import RunFailed, follow

        try:
            follow(self.server, run_id)
        except Refused as refused:
            return refused
        except RunFailed as failed:
            return Unavailable(str(failed))
        return None

    def executed(self, run_id: str) -> Counter[str]:
        """Task -> how many of its containers KFP's API says were executed in a run."""
        from pipelines.follow import tasks

        run = self.server.run(run_id)
        return executed(run.run_details.task_details or [], tasks(self.server.spec(run)))

    def ended(self, run_id: str) -> bool:
        """Whether a run is over."""
        from pipelines.follow import FINISHED

        return str(self.server.run(run_id).state) in FINISHED

    def at_work(self, run_id: str) -> list[Pod]:
        """The pods of a run whose own container is running now; drivers are not among them."""
        selector = ("--namespace", NAMESPACE, "--selector", f"pipeline/runid={run_id}")
        found: Any = self.tools.json("kubectl", "get", "pods", *selector, "--output", "json")
        pods = []
        for item in found.get("items", []):
            about: str = item["metadata"].get("annotations", {}).get(NODE_NAME, "")
            *_, task, part = ["", "", *about.split(".")]
            states = {c["name"]: c.get("state", {}) for c in item.get("status", {}).get("containerStatuses", [])}
            if part.startswith("executor") and "running" in states.get("main", {}):
                pods.append(Pod(item["metadata"]["name"], item["spec"].get("nodeName", ""), task))
        return pods


NODE_NAME = "workflows.argoproj.io/node-name"
"""Annotation in which Argo notes what a pod is for, such as select-moe-x.root.chain.warmup.executor."""


EXECUTOR = "executor"
UNNAMED = "?"


def executed(nodes: Sequence[Any], known: Mapping[str, bool]) -> Counter[str]:
    """Which tasks' containers were executed, as KFP's API lists a run's nodes.

    A task has a node of its own with the executor's node inside (in which, where there are retries, the attempts are);
    where the cache had the result, the executor is skipped. Nodes name what is inside them by the names of pods; a server
    that does not say which pod a node is leaves the executors without a task's name: `UNNAMED`.

    Args:
        nodes: the run's `task_details`.
        known: the pipeline's tasks (`pipelines.follow.tasks`).
    """
    ran = {id(node): node for node in nodes if node.display_name == EXECUTOR and node.state in EXECUTED}
    by_id = {str(key): node for node in ran.values() for key in (node.pod_name, node.task_id) if key}
    found: Counter[str] = Counter()
    for node in nodes:
        keys = {str(key) for child in node.child_tasks or [] for key in (child.pod_name, child.task_id) if key}
        for inner in {id(by_id[key]) for key in keys if key in by_id}:
            if node.display_name in known and ran.pop(inner, None) is not None:
                found[str(node.display_name)] += 1
    found[UNNAMED] = len(ran)
    return +found


EXECUTED = ("RUNNING", "SUCCEEDED", "FAILED", "CANCELING", "CANCELED")


def test(tools: Tools, place: Place, preset: str) -> int:
    """All of it, in order; the first thing that does not hold ends it.

    Raises:
        Refused: something does not hold.
    """
    root = f"{site.WORK_ROOT}/kind-test-{time.strftime('%Y%m%d-%H%M%S')}"
    trial = Trial(tools, place, preset, root)
    _step("helm test", trial.chart)
    _step("end to end", trial.reference)
    _step("again, from the cache", trial.cached)
    _step("a pod deleted in mid-stage", trial.pod_deleted)
    _step("a worker drained in mid-stage", trial.worker_drained)
    print(f"\nkind-test: everything holds; the report's identity is {trial.identity}")
    return 0


def _step(name: str, work: Callable[[], str]) -> None:
    began = time.monotonic()
    print(f"\n== {name}", flush=True)
    said = work()
    print(f"ok: {name} ({time.monotonic() - began:.0f} s): {said}", flush=True)


class Trial:
    """The steps of `make kind-test`, which share the run that the others are compared with."""

    def __init__(self, tools: Tools, place: Place, preset: str, root: str) -> None:
        self.tools = tools
        self.place = place
        self.preset = preset
        self.root = root
        self.identity = ""
        self.runs = Runs(tools, place)

    def chart(self) -> str:
        """The chart's own tests."""
        log = self.place.log("helm-test")
        try:
            # no --logs: older Helms fail over pods that succeeded and are gone
            self.tools.run("helm", "test", RELEASE, "--namespace", NAMESPACE, "--timeout", "10m", log=log)
        except Unavailable:
            selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component in ({', '.join(TESTS)})"
            words = ("--namespace", NAMESPACE, "--selector", selector, "--prefix", "--tail=100")
            self.tools.run("kubectl", "logs", *words, log=log)
            raise
        return f"log: {log}"

    def _run(self, name: str) -> tuple[str, dict[str, Any]]:
        """A run from its start to its end; returns its ID and what it noted."""
        run_id = self.runs.start(self._words(name))
        failure = self.runs.follow(run_id)
        if failure is not None:
            raise failure
        return run_id, site.record(run_id, f"{self.root}/{name}")

    def _words(self, name: str) -> dict[str, str]:
        return {"preset": self.preset, "work_root": f"{self.root}/{name}"}

    def reference(self) -> str:
        """The pipeline end to end; what KFP's API says of it must be what its tasks noted, or step 3 would prove nothing."""
        run_id, noted = self._run("reference")
        ran, own = self.runs.executed(run_id), Counter(noted["tasks"])
        # a retried task is one for the API and two for the notes; the exit handler notes nothing of itself
        agree = all(0 < ran[name] <= own[name] for name in {*ran, *own} - ALWAYS)
        if ran[UNNAMED]:
            agree = len(own) <= ran.total() <= own.total() + 1
        if not agree or not own["report"]:
            raise Refused(f"KFP's API says that {dict(ran)} were executed, the tasks noted {dict(own)}")
        self.identity = noted["identity"]
        return f"{sum(own.values())} tasks; {noted['verdict']}"

    def cached(self) -> str:
        """The same run again executes `check` and `finish`, and finds the same report."""
        run_id, noted = self._run("reference")
        ran, own = self.runs.executed(run_id), Counter(noted["tasks"])
        if {*ran, *own} - {*ALWAYS, UNNAMED} or not own["check"] or not 0 < ran.total() <= len(ALWAYS):
            raise Refused(f"the second run executed {dict(ran)} by KFP's API, {dict(own)} by the tasks' notes")
        self._same(noted)
        return f"executed: {', '.join(sorted({*own, 'finish'}))}; containers by KFP's API: {ran.total()}"

    def _same(self, noted: Mapping[str, Any]) -> None:
        if noted["identity"] != self.identity:
            raise Refused(f"the report's identity is {noted['identity']}, that of the reference {self.identity}")

    def pod_deleted(self) -> str:
        """A pod is gone at once, without a warning that could be heeded."""

        def delete(pod: Pod) -> None:
            words = ("--namespace", NAMESPACE, "--grace-period=0", "--force", "--wait=false")
            self.tools.run("kubectl", "delete", "pod", pod.name, *words, log=self.place.log("trial"))

        return self._interrupted("deleted", delete)

    def worker_drained(self) -> str:
        """A worker is drained while a task is at work on it; the services lie on the other one."""
        listed: Any = self.tools.json("kubectl", "get", "nodes", "--output", "json")
        workers = [n["metadata"] for n in listed["items"] if not n["metadata"]["name"].endswith("control-plane")]
        keeps = [n["name"] for n in workers if n.get("labels", {}).get(SERVICES) == "true"]
        others = [n["name"] for n in workers if n["name"] not in keeps]
        if not keeps or not others:
            raise UserError(f"the cluster {CLUSTER} is not that of k8s/kind/cluster.yaml: make kind-down kind-up")
        log = self.place.log("trial")

        def drain(pod: Pod) -> None:
            self.tools.run("kubectl", "uncordon", *keeps, log=log)
            words = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--grace-period=5", "--timeout=180s")
            self.tools.run("kubectl", "drain", pod.node, *words, log=log)
            self.tools.run("kubectl", "uncordon", pod.node, log=log)  # a laptop may need it for the stages that follow

        with ExitStack() as stack:
            for name in (*keeps, *others):
                stack.callback(self.tools.run, "kubectl", "uncordon", name, log=log)
            self.tools.run("kubectl", "cordon", *keeps, log=log)  # so that tasks go to the one that is drained
            return self._interrupted("drained", drain)

    def _interrupted(self, name: str, strike: Callable[[Pod], None]) -> str:
        """A run that is struck while a long stage is at work, to its end; again where KFP gave up on it."""
        words = self._words(name)
        run_id = self.runs.start(words)
        pod = self._catch(run_id)
        strike(pod)
        print(f"struck: {pod.task} ({pod.name} on {pod.node})", flush=True)
        for attempt in range(1, AGAIN + 1):
            failure = self.runs.follow(run_id)
            if failure is None:
                noted = site.record(run_id, words["work_root"])
                self._same(noted)
                return f"{pod.task} was struck; the same report after {attempt} submission{'s' * (attempt > 1)}"
            print(f"KFP gave the run up: {failure}", flush=True)
            if attempt < AGAIN:
                run_id = self.runs.start(words)
        raise Refused(f"after {AGAIN} submissions there is no report: make kind-logs")

    def _catch(self, run_id: str) -> Pod:
        """Wait for a long stage at work.

        Raises:
            Refused: the run ended before one was seen.
        """
        while True:
            for pod in self.runs.at_work(run_id):
                if pod.task in LONG:
                    return pod
            if self.runs.ended(run_id):
                raise Refused(f"run {run_id} ended before {', '.join(LONG)} were seen at work: make kind-logs")
            time.sleep(POLL)
