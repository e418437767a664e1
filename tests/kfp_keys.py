"""The cache keys of a compiled pipeline's tasks, as KFP makes them, without executing a task.

A task's key is its component, image and command, its parameters, and its input artifacts; an artifact is as new as the
key of the task that makes it. `check` is the only task whose outputs must be known: they are given, from a real one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from selectmoe.manifest import digest


class Keys:
    """Walks the specification from its root; `found` holds the key of every task that would run, by name and item."""

    def __init__(self, spec: dict[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
        self.spec = spec
        self.known = known
        self.found: dict[str, str] = {}

    def walk(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """The keys of all tasks for a run's parameters; what is not given has its default."""
        entries = self.spec["root"]["inputDefinitions"]["parameters"]
        given = {name: parameters.get(name, entry.get("defaultValue")) for name, entry in entries.items()}
        self._dag(self.spec["root"]["dag"], given, "")
        return self.found

    def _dag(self, dag: dict[str, Any], inputs: Mapping[str, Any], item: str) -> dict[str, Any]:
        """Every output of a DAG's tasks that its own outputs name."""
        outputs: dict[tuple[str, str], Any] = {}
        waiting = dict(dag["tasks"])
        while waiting:
            ready = [n for n, t in waiting.items() if not {*t.get("dependentTasks", [])} & {*waiting}]
            for name in ready:
                task = waiting.pop(name)
                for key, value in self._task(task, inputs, outputs, item).items():
                    outputs[name, key] = value
        return self._hand_out(dag.get("outputs", {}), outputs)

    def _hand_out(self, wanted: dict[str, Any], outputs: dict[tuple[str, str], Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, entry in wanted.get("artifacts", {}).items():
            chosen = [outputs.get((s["producerSubtask"], s["outputArtifactKey"])) for s in entry["artifactSelectors"]]
            given[name] = next(value for value in chosen if value is not None)
        for name, entry in wanted.get("parameters", {}).items():
            one = entry.get("valueFromOneof", {}).get("parameterSelectors") or [entry.get("valueFromParameter")]
            chosen = [outputs.get((s["producerSubtask"], s["outputParameterKey"])) for s in one]
            given[name] = next((value for value in chosen if value is not None), None)
        return given

    def _task(
        self, task: dict[str, Any], inputs: Mapping[str, Any], outputs: dict[tuple[str, str], Any], item: str
    ) -> dict[str, Any]:
        given = self._given(task, inputs, outputs)
        condition = task.get("triggerPolicy", {}).get("condition", "")
        if condition and not self._holds(condition, given):
            return {}
        component = self.spec["components"][task["componentRef"]["name"]]
        iterator = task.get("parameterIterator")
        if iterator is None:
            return self._execute(task, component, given, item)
        items = given[iterator["items"]["inputParameter"]]
        each = [self._execute(task, component, given | {iterator["itemInput"]: i}, f"[{i}]") for i in items]
        return {key: digest([made[key] for made in each]) for key in (each[0] if each else {})}

    def _given(
        self, task: dict[str, Any], inputs: Mapping[str, Any], outputs: dict[tuple[str, str], Any]
    ) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, entry in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in entry:
                given[name] = inputs[entry["componentInputParameter"]]
            elif "taskOutputParameter" in entry:
                source = entry["taskOutputParameter"]
                given[name] = outputs[source["producerTask"], source["outputParameterKey"]]
            elif "runtimeValue" in entry:
                given[name] = entry["runtimeValue"]["constant"]
        for name, entry in task.get("inputs", {}).get("artifacts", {}).items():
            if "componentInputArtifact" in entry:
                given[name] = inputs[entry["componentInputArtifact"]]
            else:
                source = entry["taskOutputArtifact"]
                given[name] = outputs[source["producerTask"], source["outputArtifactKey"]]
        return given

    def _holds(self, condition: str, given: Mapping[str, Any]) -> bool:
        """A condition of the form a == 'x' && !(b == 'y'), as the compiler writes it."""
        for part in condition.split(" && "):
            match = re.fullmatch(r"(!\()?inputs\.parameter_values\['([^']+)'\] == '([^']*)'\)?", part)
            assert match, condition
            if (given[match[2]] == match[3]) == bool(match[1]):
                return False
        return True

    def _execute(
        self, task: dict[str, Any], component: dict[str, Any], given: dict[str, Any], item: str
    ) -> dict[str, Any]:
        if "dag" in component:
            return self._dag(component["dag"], given, item)
        name = task["taskInfo"]["name"]
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        what = [component["executorLabel"], container["image"], container["command"], container["args"]]
        key = digest([what, json.loads(json.dumps(given, default=str))])
        self.found[f"{name}{item}"] = key
        definitions = component.get("outputDefinitions", {})
        names = [*definitions.get("artifacts", {}), *definitions.get("parameters", {})]
        return {output: self.known.get(name, {}).get(output, f"{key}/{output}") for output in names}
