"""Plain manifests out of the chart, for clusters that are not run with Helm: k8s/base and its overlays.

    python -m k8s.render                                              # write k8s/base and k8s/overlays anew
    python -m k8s.render values=mine.yaml namespace=team output=out   # a base of your own values

The base is what Helm would install (release select-moe, namespace kubeflow, k8s/values.yaml over the chart's defaults),
its hooks among the rest as ordinary Jobs: they wait for each other and may be run again. An overlay is a values file,
too; what it changes is written as patches over the base, so that `kubectl kustomize` gives exactly what the chart gives
for these values. A test says when either is stale. It runs `helm` (that of .venv, or the one on PATH).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from selectmoe.entry import enter
from selectmoe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "select-moe"
HERE = ROOT / "k8s"
RELEASE, NAMESPACE = "select-moe", "kubeflow"
OVERLAYS = {"kind": CHART / "values-kind.yaml", "gpu-cluster": HERE / "overlays" / "gpu-cluster" / "values.yaml"}
"""Overlay -> the values that it stands for."""
FILES = ("mlflow", "seaweedfs", "pipeline", "network")
"""Components with a file of their own; the Jobs and what they run as are in jobs.yaml."""
KEYS = ("values", "namespace", "output")
HEAD = "# Written by `python -m k8s.render` from helm/select-moe; do not edit.\n"
Doc = dict[str, Any]


def helm() -> str:
    """The program.

    Raises:
        UserError: there is none.
    """
    own = ROOT / ".venv" / "bin" / "helm"
    found = str(own) if own.exists() else shutil.which("helm")
    if not found:
        raise UserError("helm is not on PATH: python scripts/chart_tools.py, or https://helm.sh/docs/intro/install/")
    return found


def render(values: list[Path], namespace: str = NAMESPACE) -> list[Doc]:
    """The chart's objects for some values, without what only Helm understands.

    Args:
        values: files over the chart's defaults; later wins.
        namespace: where the objects go.

    Raises:
        UserError: the chart refuses the values.
    """
    words = [helm(), "template", RELEASE, str(CHART), "--namespace", namespace, "--skip-tests"]
    for file in values:
        words += ["--values", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr)
    return [plain(doc) for doc in yaml.safe_load_all(done.stdout) if doc]


def plain(doc: Doc) -> Doc:
    """An object as kubectl takes it: no hook, no chart, managed by kustomize."""
    for metadata in _metadata(doc):
        for key in [key for key in metadata.get("annotations") or {} if key.startswith("helm.sh/")]:
            del metadata["annotations"][key]
        if not metadata.get("annotations", True):
            del metadata["annotations"]
        labels = metadata.get("labels") or {}
        labels.pop("helm.sh/chart", None)
        if labels.get("app.kubernetes.io/managed-by") == "Helm":
            labels["app.kubernetes.io/managed-by"] = "kustomize"
    return doc


def _metadata(value: Any) -> Iterator[Doc]:
    """Every metadata of an object: its own, and its pods'."""
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            yield value["metadata"]
        for item in value.values():
            yield from _metadata(item)


def component(doc: Doc) -> str:
    """The file that an object belongs into."""
    name = doc["metadata"]["labels"]["app.kubernetes.io/component"]
    return name if name in FILES and doc["kind"] != "Job" else "jobs"


class Block(yaml.SafeDumper):
    """YAML in which texts of several lines stay readable."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Block.add_representer(str, _text)
Block.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def dump(docs: list[Doc]) -> str:
    """Documents as YAML."""
    return HEAD + "---\n".join(yaml.dump(doc, Dumper=Block, sort_keys=False, width=120) for doc in docs)


def base(docs: list[Doc]) -> dict[str, str]:
    """File name -> contents of a kustomize base."""
    files: dict[str, list[Doc]] = {}
    for doc in docs:
        files.setdefault(f"{component(doc)}.yaml", []).append(doc)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
    }
    return {name: dump(found) for name, found in files.items()} | {"kustomization.yaml": dump([kustomization])}


def overlay(old: list[Doc], new: list[Doc]) -> dict[str, str]:
    """File name -> contents of an overlay that turns one rendering into another."""
    before, after = ({(d["kind"], d["metadata"]["name"]): d for d in docs} for docs in (old, new))
    patches: list[Doc] = []
    for key, doc in before.items():
        target = {"kind": key[0], "name": key[1]}
        if key not in after:
            gone = {"apiVersion": doc["apiVersion"], "kind": key[0], "metadata": {"name": key[1]}, "$patch": "delete"}
            patches.append({"patch": yaml.safe_dump(gone, sort_keys=False), "target": target})
        elif steps := list(difference(doc, after[key])):
            text = yaml.dump(steps, Dumper=Block, sort_keys=False, width=120)
            patches.append({"target": target, "patch": text})
    added = [doc for key, doc in after.items() if key not in before]
    kustomization: Doc = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    kustomization["resources"] = ["../../base", *(["added.yaml"] if added else [])]
    kustomization["patches"] = patches
    return {"kustomization.yaml": dump([kustomization])} | ({"added.yaml": dump(added)} if added else {})


def difference(old: Any, new: Any, path: str = "") -> Iterator[Doc]:
    """The steps of a JSON patch (RFC 6902) from one value to another; lists of another length are replaced whole.

    The path stands last, because kubectl takes the line end off a patch, and a text at its end would lose its own.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            where = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                yield {"op": "remove", "path": where}
            else:
                yield from difference(old[key], new[key], where)
        for key in new:
            if key not in old:
                yield {"op": "add", "value": new[key], "path": f"{path}/{key.replace('~', '~0').replace('/', '~1')}"}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from difference(left, right, f"{path}/{n}")
    elif json.dumps(old) != json.dumps(new):
        yield {"op": "replace", "value": new, "path": path}


def everything() -> dict[Path, str]:
    """Path -> contents of all that is committed under k8s/."""
    common = HERE / "values.yaml"
    old = render([common])
    files = {HERE / "base" / name: text for name, text in base(old).items()}
    for name, values in OVERLAYS.items():
        made = overlay(old, render([common, values]))
        files |= {HERE / "overlays" / name / file: text for file, text in made.items()}
    return files


def command(arguments: list[str]) -> int:
    """Do what the command line says.

    Raises:
        UserError: a word that is not understood, or values that the chart refuses.
    """
    given: dict[str, str] = {}
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in KEYS or not value:
            raise UserError(f"{word!r} is not understood: known are {', '.join(f'{key}=' for key in KEYS)}")
        given[key] = value
    if not given:
        files = everything()
    elif "output" not in given:
        raise UserError("output= is missing: the folder for the manifests of your values")
    else:
        values = [HERE / "values.yaml", *([Path(given["values"])] if "values" in given else [])]
        made = base(render(values, given.get("namespace", NAMESPACE)))
        files = {Path(given["output"]) / name: text for name, text in made.items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(files)} files written")
    return 0


def main(arguments: list[str]) -> int:
    """The command line; exit codes as in docs/design.md, "Errors"."""
    return enter("render", lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
