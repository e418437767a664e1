"""The Pod Security Standard "restricted" as a rule over manifests: its own controls, and those of "baseline" below it.

No command; test_pod_security.py tries it with pods that break one control each. It knows Linux pods only (the standard
lets `os: windows` off some controls, nothing here runs there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from manifests import Doc, Pod, annotations, pods

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}
SELINUX = {"", None, "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = ("RuntimeDefault", "Localhost")
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def findings(docs: Iterable[Doc]) -> Iterator[str]:
    """What a namespace that enforces "restricted" would refuse."""
    for pod in pods(docs):
        for finding in _pod(pod):
            yield f"{pod.title}: {finding}"
        for container in pod.containers():
            for finding in _container(container, pod.spec.get("securityContext") or {}):
                yield f"{pod.title}: container {container['name']}: {finding}"


def _pod(pod: Pod) -> Iterator[str]:
    spec, context = pod.spec, pod.spec.get("securityContext") or {}
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is not allowed"
    for volume in spec.get("volumes") or []:
        for kind in set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']} of type {kind} is not allowed"
    for sysctl in context.get("sysctls") or []:
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']} is not allowed"
    for key, value in annotations(pod.template).items():
        if key.startswith(APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"annotation {key}={value} is not allowed"
    yield from _context(context)
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot must not be false"


def _container(container: Doc, pod: Doc) -> Iterator[str]:
    context = container.get("securityContext") or {}
    if context.get("privileged"):
        yield "privileged is not allowed"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation must be false"
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot must be true, here or in the pod"
    if (context.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in PROFILES:
        yield "seccompProfile must be RuntimeDefault or Localhost, here or in the pod"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities.drop must have ALL"
    if added := sorted(set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}):
        yield f"capability {added[0]} is not allowed"
    if context.get("procMount") not in (None, "", "Default"):
        yield "procMount must be Default"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"hostPort {port['hostPort']} is not allowed"
    yield from _context(context)
    yield from _handlers(container)


def _context(context: Doc) -> Iterator[str]:
    """What a pod's security context and a container's have in common."""
    if context.get("runAsUser") == 0:
        yield "runAsUser must not be 0"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "windowsOptions.hostProcess is not allowed"
    if (context.get("seccompProfile") or {}).get("type") not in (None, *PROFILES):
        yield "seccompProfile must be RuntimeDefault or Localhost"
    if (context.get("appArmorProfile") or {}).get("type") not in (None, *PROFILES):
        yield "appArmorProfile must be RuntimeDefault or Localhost"
    options = context.get("seLinuxOptions") or {}
    if options.get("type") not in SELINUX:
        yield f"seLinuxOptions.type {options['type']} is not allowed"
    for key in ("user", "role"):
        if options.get(key):
            yield f"seLinuxOptions.{key} is not allowed"


def _handlers(container: Doc) -> Iterator[str]:
    """Probes and lifecycle handlers ask the pod itself, no other host."""
    lifecycle = container.get("lifecycle") or {}
    for key, handler in (*container.items(), *lifecycle.items()):
        if key.endswith("Probe") or key in ("postStart", "preStop"):
            for action in ("httpGet", "tcpSocket"):
                if (handler.get(action) or {}).get("host"):
                    yield f"{key}.{action}.host is not allowed"
