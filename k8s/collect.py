"""What helps to find out what went wrong in a cluster, in one folder: `make kind-logs`. No Secret is read.

No command runs this module; `python -m k8s.kind logs` does.
"""

from __future__ import annotations

from pathlib import Path

from k8s.place import CLUSTER, NAMESPACE, RELEASE, Place
from k8s.tools import Tools

SPACE = ("--namespace", NAMESPACE)
TAIL = "--tail=5000"
ASKED: dict[str, tuple[str, ...]] = {
    "nodes.txt": ("kubectl", "describe", "nodes"),
    "everything.txt": ("kubectl", "get", "all,pvc,pv,networkpolicy,configmap", "--all-namespaces", "--output", "wide"),
    "events.txt": ("kubectl", "get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
    "pods.txt": ("kubectl", "describe", "pods", *SPACE),
    "workflows.yaml": ("kubectl", "get", "workflows.argoproj.io", *SPACE, "--output", "yaml"),
    "profile.yaml": ("kubectl", "get", "configmap", f"{RELEASE}-profile", *SPACE, "--output", "yaml"),
    "helm-status.txt": ("helm", "status", RELEASE, *SPACE),
    "helm-values.yaml": ("helm", "get", "values", RELEASE, *SPACE, "--all"),
    "helm-history.txt": ("helm", "history", RELEASE, *SPACE),
}
"""File -> the command whose answer it holds."""


def collect(tools: Tools, place: Place, folder: Path) -> str:
    """Fill a folder; what cannot be had is said and stops nothing.

    Args:
        tools: the programs.
        place: the logs of our own steps lie there.
        folder: where everything goes.

    Returns:
        What was collected, and what not, for a person.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name, words in ASKED.items() if not _ask(tools, folder / name, words)]
    pods = folder / "pods"
    pods.mkdir(exist_ok=True)
    names = tools.ask_anyway("kubectl", "get", "pods", *SPACE, "--output", "name").stdout.split()
    for name in names:
        words = ("kubectl", "logs", name, *SPACE, "--all-containers", "--prefix", "--timestamps", TAIL)
        if not _ask(tools, pods / f"{name.partition('/')[2]}.log", words):
            failed.append(name)
    exported = tools.ask_anyway("kind", "export", "logs", str(folder / "kind"), "--name", CLUSTER)
    if exported.returncode:
        failed.append("kind/")
    own = folder / "make"
    own.mkdir(exist_ok=True)
    for path in sorted(place.logs.glob("*.log")):
        (own / path.name).write_bytes(path.read_bytes())
    files = sum(path.is_file() for path in folder.rglob("*"))
    lacking = f"; without {', '.join(failed)} (each file says why)" if failed else ""
    return f"{files} files in {folder}{lacking}"


def _ask(tools: Tools, path: Path, words: tuple[str, ...]) -> bool:
    """Write a command's answer; whether it gave one."""
    done = tools.ask_anyway(*words)
    path.write_text(f"{done.stdout}{done.stderr}", encoding="utf-8")
    return done.returncode == 0
