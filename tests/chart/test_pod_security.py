"""The checker of "restricted" refuses a pod for every control of the standard that it breaks, and no pod that keeps them."""

from __future__ import annotations

import copy
from typing import Any

import pod_security
import pytest
from manifests import Doc

CONTEXT = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
GOOD: Doc = {
    "kind": "Deployment",
    "metadata": {"name": "good"},
    "spec": {
        "template": {
            "metadata": {},
            "spec": {
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{"name": "main", "securityContext": CONTEXT, "livenessProbe": {"httpGet": {"port": 1}}}],
                "initContainers": [{"name": "first", "securityContext": CONTEXT}],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            },
        }
    },
}
POD, MAIN, FIRST = "", "containers", "initContainers"
BAD: list[tuple[str, str, Any, str]] = [
    (POD, "hostNetwork", True, "hostNetwork"),
    (POD, "hostPID", True, "hostPID"),
    (POD, "hostIPC", True, "hostIPC"),
    (POD, "volumes", [{"name": "root", "hostPath": {"path": "/"}}], "hostPath"),
    (POD, "volumes", [{"name": "disk", "nfs": {}}], "nfs"),
    (POD, "securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}], "kernel.msgmax"),
    (POD, "securityContext.runAsUser", 0, "runAsUser"),
    (POD, "securityContext.runAsNonRoot", None, "runAsNonRoot"),
    (POD, "securityContext.runAsNonRoot", False, "runAsNonRoot"),
    (POD, "securityContext.seccompProfile", None, "seccompProfile"),
    (POD, "securityContext.seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
    (POD, "securityContext.appArmorProfile", {"type": "Unconfined"}, "appArmorProfile"),
    (POD, "securityContext.seLinuxOptions", {"type": "spc_t"}, "spc_t"),
    (POD, "securityContext.seLinuxOptions", {"user": "root"}, "seLinuxOptions.user"),
    (POD, "securityContext.windowsOptions", {"hostProcess": True}, "hostProcess"),
    (MAIN, "securityContext", None, "allowPrivilegeEscalation"),
    (MAIN, "securityContext.privileged", True, "privileged"),
    (MAIN, "securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    (MAIN, "securityContext.runAsNonRoot", False, "runAsNonRoot"),
    (MAIN, "securityContext.runAsUser", 0, "runAsUser"),
    (MAIN, "securityContext.seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
    (MAIN, "securityContext.capabilities", {"drop": ["NET_RAW"]}, "drop"),
    (MAIN, "securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "SYS_PTRACE"),
    (MAIN, "securityContext.procMount", "Unmasked", "procMount"),
    (MAIN, "securityContext.seLinuxOptions", {"role": "system_r"}, "seLinuxOptions.role"),
    (MAIN, "ports", [{"containerPort": 80, "hostPort": 80}], "hostPort"),
    (MAIN, "livenessProbe", {"httpGet": {"host": "169.254.169.254", "port": 80}}, "host"),
    (MAIN, "lifecycle", {"preStop": {"httpGet": {"host": "example.org", "port": 80}}}, "host"),
    (FIRST, "securityContext.privileged", True, "privileged"),
    (FIRST, "securityContext.capabilities", {}, "drop"),
]


def _changed(place: str, path: str, value: Any) -> Doc:
    """The good deployment with one field changed (None: taken away)."""
    doc = copy.deepcopy(GOOD)
    at = doc["spec"]["template"]["spec"]
    at = at[place][0] if place else at
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    at[last] = value
    if value is None:
        del at[last]
    return doc


def test_a_pod_that_keeps_the_standard() -> None:
    assert not list(pod_security.findings([GOOD]))


@pytest.mark.parametrize(("place", "path", "value", "said"), BAD)
def test_a_pod_that_breaks_one_control(place: str, path: str, value: Any, said: str) -> None:
    found = list(pod_security.findings([_changed(place, path, value)]))
    assert any(line.startswith("Deployment/good: ") and said in line for line in found), found


def test_an_unconfined_app_armor_annotation() -> None:
    doc = copy.deepcopy(GOOD)
    doc["spec"]["template"]["metadata"]["annotations"] = {pod_security.APPARMOR + "main": "unconfined"}
    assert "unconfined" in next(pod_security.findings([doc]))


@pytest.mark.parametrize("kind", ["Job", "CronJob", "StatefulSet", "Pod"])
def test_every_kind_that_starts_pods_is_seen(kind: str) -> None:
    template = _changed(POD, "hostPID", True)["spec"]["template"]
    spec: Doc = {"template": template}
    doc = {
        "Job": {"spec": spec},
        "StatefulSet": {"spec": spec},
        "CronJob": {"spec": {"jobTemplate": {"spec": spec}}},
        "Pod": template,
    }[kind]
    assert list(pod_security.findings([{**doc, "kind": kind, "metadata": {"name": "x"}}]))
