"""Stand-ins for docker, podman, kind, kubectl, helm and git: programs of those names that answer as the real ones do.

Not the real programs: no cluster can be made where these tests run. A stand-in notes every call, keeps what there would be
(clusters, nodes, images, releases) in a JSON file, and fails where the real program would (kubectl without a cluster,
helm without its namespace). `faults` in that file make calls fail: {"PROGRAM PATTERN": "what it prints"}.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def install(folder: Path, *names: str) -> None:
    """Put stand-ins of some names into a folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        program = folder / name
        program.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        program.chmod(0o755)


START: dict[str, Any] = {
    "versions": {
        "docker": "29.1.0",
        "podman": "5.6.0",
        "kind": "0.33.0",
        "kubectl": "1.36.2",
        "helm": "4.1.0",
        "git": "2.47.0",
    },
    "machine": [8, 17179869184],
    "clusters": {},
    "images": {},
    "namespaces": {},
    "releases": {},
    "applied": [],
    "pods": {},
    "answers": {},
    "faults": {},
}


class Failed(Exception):
    """The program prints this as an error, and ends with 1."""


def main(name: str, words: list[str]) -> str:
    """What a call prints."""
    path = Path(os.environ["STAND_IN"])
    with open(path, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = json.load(file)
        state["calls"].append([name, *words])
        for pattern, text in state["faults"].items():
            if re.search(pattern, " ".join([name, *words])):
                file.seek(0)
                file.truncate()
                json.dump(state, file)
                raise Failed(text)
        try:
            return {"docker": engine, "podman": engine, "kind": kind, "kubectl": kubectl, "helm": helm, "git": git}[
                name
            ](state, name, words)
        finally:
            file.seek(0)
            file.truncate()
            json.dump(state, file)


def value(words: list[str], option: str) -> str:
    """What follows an option."""
    return words[words.index(option) + 1] if option in words else ""


def git(state: dict[str, Any], name: str, words: list[str]) -> str:
    return f"git version {state['versions']['git']}"


def engine(state: dict[str, Any], name: str, words: list[str]) -> str:
    nodes = {node: where for c in state["clusters"].values() for node, where in c["nodes"].items()}
    if words[0] == "--version":
        return f"{name} version {state['versions'][name]}"
    if words[0] == "version":
        return str(state["versions"][name])
    if words[0] == "info":
        cpus, memory = state["machine"]
        docker = {"NCPU": cpus, "MemTotal": memory}
        return json.dumps({"host": {"cpus": cpus, "memTotal": memory}} if name == "podman" else docker)
    if words[0] == "build":
        state["images"][value(words, "--tag")] = "sha256:" + "ab" * 32
    elif words[:2] == ["image", "inspect"]:
        if words[-1] not in state["images"]:
            raise Failed(f"Error: No such image: {words[-1]}")
        return str(state["images"][words[-1]])
    elif words[0] == "tag":
        state["images"][words[2]] = state["images"][words[1]]
    elif words[0] == "save":
        target = Path(value(words, "--output"))
        if name == "podman" and target.exists():
            raise Failed("docker-archive doesn't support modifying existing images")
        target.write_text(words[-1], encoding="utf-8")
    elif words[0] == "start":
        for node in words[1:]:
            nodes[node]["up"] = True
    elif words[0] == "cp":
        node, _, target = words[2].partition(":")
        assert Path(words[1]).is_dir()
        nodes[node]["files"].append(target)
    elif words[0] == "exec":
        return inside(nodes[words[1]], words[2:])
    return ""


def inside(node: dict[str, Any], words: list[str]) -> str:
    """What a program on a node does."""
    if not node["up"]:
        raise Failed("Error response from daemon: container is not running")
    if words[0] == "crictl" and words[-1] not in node["images"]:
        raise Failed("no such image")
    if words[:2] == ["test", "-f"] and words[2] not in node["files"]:
        raise Failed("")
    if words[0] == "touch":
        node["files"].append(words[1])
    return ""


def kind(state: dict[str, Any], name: str, words: list[str]) -> str:
    cluster = value(words, "--name")
    there = state["clusters"].get(cluster)
    if words[0] == "version":
        return f"kind v{state['versions']['kind']} go1.25.1 linux/amd64"
    if words[:2] == ["get", "clusters"]:
        return "\n".join(state["clusters"])
    if words[:2] == ["get", "nodes"]:
        return "\n".join(reversed(there["nodes"])) if there else ""
    if words[:2] == ["create", "cluster"]:
        if there:
            raise Failed(
                f'ERROR: failed to create cluster: node(s) already exist for a cluster with the name "{cluster}"'
            )
        config = Path(value(words, "--config")).read_text(encoding="utf-8")
        workers = len(re.findall(r"role: worker", config))
        names = [f"{cluster}-control-plane", *(f"{cluster}-worker{n if n > 1 else ''}" for n in range(1, workers + 1))]
        nodes = {node: {"up": True, "images": [], "files": [], "cordoned": False} for node in names}
        provider = os.environ.get("KIND_EXPERIMENTAL_PROVIDER", "docker")
        state["clusters"][cluster] = {"nodes": nodes, "provider": provider, "config": config}
    if words[:2] in (["create", "cluster"], ["export", "kubeconfig"]):
        Path(value(words, "--kubeconfig")).write_text(cluster, encoding="utf-8")
    if words[:2] == ["load", "image-archive"]:
        for node in value(words, "--nodes").split(","):
            there["nodes"][node]["images"].append(Path(words[2]).read_text(encoding="utf-8"))
    if words[:2] == ["delete", "cluster"]:
        state["clusters"].pop(cluster, None)
        state["namespaces"], state["releases"], state["applied"] = {}, {}, []
    return ""


def kubectl(state: dict[str, Any], name: str, words: list[str]) -> str:
    if words[0] == "version":
        return json.dumps({"clientVersion": {"gitVersion": f"v{state['versions']['kubectl']}"}})
    config = Path(os.environ["KUBECONFIG"])
    cluster = state["clusters"].get(config.read_text(encoding="utf-8")) if config.is_file() else None
    if cluster is None or not cluster["nodes"][next(iter(cluster["nodes"]))]["up"]:
        raise Failed(
            "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
        )
    if words[0] == "apply":
        if "site.yaml" in words[-1] and "kubeflow" not in state["namespaces"]:
            raise Failed('Error from server (NotFound): namespaces "kubeflow" not found')
        state["applied"].append(words[-1])
        if words[-1].endswith("/kfp"):
            state["namespaces"].setdefault("kubeflow", {})
    elif words[0] == "annotate":
        state["namespaces"][words[3]].update([words[4].split("=", 1)])
    elif words[0] == "get":
        return answer(state, cluster, words[1:])
    elif words[0] in ("cordon", "uncordon", "drain"):
        for node in (word for word in words[1:] if word in cluster["nodes"]):
            cluster["nodes"][node]["cordoned"] = words[0] != "uncordon"
    return ""


def answer(state: dict[str, Any], cluster: dict[str, Any], words: list[str]) -> str:
    """What `kubectl get` prints."""
    if words[:1] == ["namespace"]:
        marks = state["namespaces"].get(words[1])
        return "" if marks is None else json.dumps({"metadata": {"annotations": marks}})
    if words[:1] == ["nodes"]:
        labels = {"select-moe-worker": {"select-moe/services": "true"}}
        return json.dumps({"items": [{"metadata": {"name": n, "labels": labels.get(n, {})}} for n in cluster["nodes"]]})
    if words[:1] == ["pods"] and "--selector" in words:
        run = value(words, "--selector").partition("=")[2]
        items = state["pods"].get(run, state["pods"].get("*", []))
        return json.dumps({"items": items})
    if words[:1] in (["configmap"], ["secret"]):
        if not state["releases"]:
            raise Failed(f'Error from server (NotFound): {words[0]}s "{words[1]}" not found')
        return json.dumps(state["answers"][f"{words[0]}/{words[1]}"])
    return "ok"


def helm(state: dict[str, Any], name: str, words: list[str]) -> str:
    if words[0] == "version":
        return f"v{state['versions']['helm']}"
    namespace = value(words, "--namespace")
    if words[:2] == ["upgrade", "--install"]:
        if namespace not in state["namespaces"]:
            raise Failed(f'Error: create: failed to create: namespaces "{namespace}" not found')
        state["releases"][words[2]] = {"namespace": namespace, "set": value(words, "--set-string")}
    elif words[1:] and words[-1] not in state["releases"] and not any(r in words for r in state["releases"]):
        raise Failed("Error: release: not found")
    return "ok"


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[0]).name, sys.argv[1:]))
    except Failed as failed:
        print(failed, file=sys.stderr)
        sys.exit(1)
