"""Where everything about the kind cluster lies: files, names, addresses, and what its Secrets and ConfigMaps say.

No command runs this module; `python -m k8s.kind` and k8s/trial.py share it.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from k8s.tools import ROOT, Tools
from selectmoe.errors import Unavailable, UserError

HERE = ROOT / "k8s" / "kind"
CLUSTER = "select-moe"
NAMESPACE = "kubeflow"
"""KFP standalone runs its tasks there, and a pod can use Secrets and volumes of its own namespace only."""
RELEASE = "select-moe"
CHART = ROOT / "helm" / "select-moe"
MODELS = "/var/lib/select-moe/models"
"""The model cache on a node (k8s/kind/site.yaml)."""
MOUNT = "/models"
"""Where tasks see it (helm/select-moe/values-kind.yaml)."""
WORK_ROOT = "s3://select-moe/work"
PORTS = {"ui": 30880, "api": 30888, "mlflow": 30500, "s3": 30833}
"""The NodePorts; k8s/kind/cluster.yaml says which ports of this machine lead to them."""
SERVICES = "select-moe/services"
"""Label of the node on which the services lie."""


class Place:
    """The cluster's files on this machine, and its addresses.

    Args:
        state: folder of everything that the commands leave behind.
        config: the cluster's configuration.
    """

    def __init__(self, state: Path, config: Path = HERE / "cluster.yaml") -> None:
        self.state = state
        self.config = yaml.safe_load(config.read_text(encoding="utf-8"))
        self.kubeconfig = state / "kubeconfig"
        self.logs = state / "logs"

    def log(self, name: str) -> Path:
        """The log of one step."""
        return self.logs / f"{name}.log"

    def ports(self) -> dict[str, int]:
        """Service -> port of this machine."""
        mapped = {
            entry["containerPort"]: int(entry["hostPort"])
            for node in self.config["nodes"]
            for entry in node.get("extraPortMappings", [])
        }
        return {name: mapped[port] for name, port in PORTS.items()}

    def address(self, service: str) -> str:
        """Where this machine finds a service: ui, api, mlflow or s3."""
        return f"http://127.0.0.1:{self.ports()[service]}"

    def check_ports(self) -> None:
        """Prove that nobody else listens where the cluster is to.

        Raises:
            UserError: a port is taken.
        """
        for name, port in self.ports().items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise UserError(
                        f"port {port} (for {name}) cannot be had ({error.strerror}): end what listens there, or change hostPort in k8s/kind/cluster.yaml"
                    ) from None


def answers(url: str, seconds: float) -> None:
    """Wait until an address answers.

    Raises:
        Unavailable: it does not.
    """
    end = time.monotonic() + seconds
    reason = ""
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:  # a refused connection, a proxy's 502, a time-out
            reason = str(error)
        time.sleep(1)
    raise Unavailable(f"{url} does not answer after {seconds:.0f} s ({reason}): make kind-logs")


def clusters(tools: Tools) -> list[str]:
    """Names of the kind clusters that are here."""
    return tools.ask("kind", "get", "clusters").split()


def nodes(tools: Tools) -> list[str]:
    """The cluster's nodes (containers of the same names); the control plane comes first."""
    names = tools.ask("kind", "get", "nodes", "--name", CLUSTER).split()
    return sorted(names, key=lambda name: (not name.endswith("control-plane"), name))


def need_cluster(tools: Tools) -> None:
    """Prove that the cluster is up.

    Raises:
        UserError: it is not there, or does not answer.
    """
    if CLUSTER not in clusters(tools):
        raise UserError(f"there is no kind cluster {CLUSTER!r}: make kind-up")
    if tools.ask_anyway("kubectl", "get", "--raw", "/readyz").returncode:
        raise UserError(f"the kind cluster {CLUSTER!r} is there, but does not answer: make kind-up starts it again")


def profile(tools: Tools, place: Place) -> Path:
    """The site's profile, as the chart rendered it.

    Raises:
        UserError: the chart is not installed.
    """
    name = f"{RELEASE}-profile"
    done = tools.ask_anyway("kubectl", "get", "configmap", name, "--namespace", NAMESPACE, "--output", "json")
    if done.returncode:
        raise UserError(f"the chart is not installed (no ConfigMap {name} in {NAMESPACE}): make kind-up")
    path = place.state / "profile.yaml"
    path.write_text(json.loads(done.stdout)["data"]["profile.yaml"], encoding="utf-8")
    return path


def s3_environment(tools: Tools, place: Place) -> dict[str, str]:
    """What a client of the cluster's S3 needs on this machine; the keys are read from the cluster and not kept."""
    name = f"{RELEASE}-s3"
    found: Any = tools.json("kubectl", "get", "secret", name, "--namespace", NAMESPACE, "--output", "json")
    keys = {
        key: base64.b64decode(found["data"][key]).decode() for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    return keys | {"AWS_ENDPOINT_URL_S3": place.address("s3"), "AWS_DEFAULT_REGION": region}


def record(run_id: str, work_root: str) -> dict[str, Any]:
    """What a run's exit handler noted: the tasks that were executed, the verdict, the report's identity.

    Raises:
        Unavailable: it noted nothing.
    """
    from selectmoe.storage import open_store

    found = open_store(f"{work_root}/runs").get(f"{run_id}.json")
    if found is None:
        raise Unavailable(f"{work_root}/runs/{run_id}.json is not there: did the exit handler run? make kind-logs")
    noted: dict[str, Any] = json.loads(found)
    return noted
