"""The whole system in a kind cluster on this machine: what `make kind-up`, `kind-run`, `kind-test`, `kind-logs` and `kind-down` call.

    python -m k8s.kind up [image=select-moe:dev]
    python -m k8s.kind run [preset=quick] [key=value ...]
    python -m k8s.kind test [preset=tiny]
    python -m k8s.kind logs [output=FOLDER]
    python -m k8s.kind down

`up` makes the cluster and installs Kubeflow Pipelines in it while the image is built, then installs the chart; what is
there already is left as it is. `run` submits the pipeline with the profile that the chart rendered, and follows it:
further words are those of `python -m pipelines submit`. `test` is k8s/trial.py. Docker or Podman does the work
(`CONTAINER_ENGINE` or `KIND_EXPERIMENTAL_PROVIDER` choose); everything lies in `.selectmoe/kind/` and in the nodes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from k8s import place as site
from k8s.place import CHART, CLUSTER, HERE, MODELS, NAMESPACE, RELEASE, Place
from k8s.tools import ROOT, Tools
from selectmoe.entry import ending, enter
from selectmoe.errors import Unavailable, UserError

KFP = HERE / "kfp"
MARK = "select-moe/kfp"
"""Annotation of the namespace: the digest of what was installed from k8s/kind/kfp."""
GIB = 2**30
NEEDED = 12 * GIB
"""Memory below which services and tasks do not fit beside each other."""
WISHED = (8, 16 * GIB)
"""CPUs and memory on which `make kind-up kind-run` is meant to take ten minutes."""
SHARDS = "2"
"""Tasks that share the routing, the longest stage; more judges than two do not fit into a laptop at once."""
OURS = "select-moe"
"""The image's name in the cluster; its tag is its content's, so that another image is another name."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what was done and how long it took."""
    began = time.monotonic()
    yield
    print(f"{name} ({time.monotonic() - began:.0f} s)", flush=True)


def up(tools: Tools, place: Place, given: dict[str, str]) -> int:
    """Make the cluster, install KFP and the chart, and wait until everything answers."""
    began = time.monotonic()
    chart_is_there()
    cpus, memory = enough(tools)
    place.state.mkdir(parents=True, exist_ok=True)
    with ending(tools.stop):
        tag = _together(
            tools,
            lambda: image(tools, place, given.get("image", "")),
            lambda: cluster(tools, place, memory),
        )[0]
        load(tools, place, tag)
        demo(tools, place, "quick")
        install(tools, place, tag)
        ready(tools, place)
    print(f"\nup after {time.monotonic() - began:.0f} s on {cpus} CPUs and {memory / GIB:.0f} GiB:")
    for title, service in (("Kubeflow Pipelines", "ui"), ("its API", "api"), ("MLflow", "mlflow"), ("S3", "s3")):
        print(f"  {title:<20}{place.address(service)}")
    print(f"  {'kubectl':<20}export KUBECONFIG={place.kubeconfig}")
    print("next: make kind-run, kind-test, kind-logs; make kind-down removes all of it")
    return 0


def _together(tools: Tools, *works: Callable[[], Any]) -> list[Any]:
    """Do several things at once; where one fails, the programs of the others are ended."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((future for future in done if future.exception()), None)
        if failed is not None:
            tools.stop()
            failed.result()
        return [future.result() for future in futures]


def chart_is_there() -> None:
    """Prove that this is a checkout with the chart, before anything is made.

    Raises:
        UserError: it is not.
    """
    if not (CHART / "values-kind.yaml").is_file():
        raise UserError(f"{CHART}/values-kind.yaml is missing: run this in a checkout of the project")


def enough(tools: Tools) -> tuple[int, int]:
    """CPUs and memory of the machine that containers run on.

    Raises:
        UserError: too little memory to begin with.
    """
    cpus, memory = tools.machine()
    if memory < NEEDED:
        raise UserError(
            f"containers have {memory / GIB:.1f} GiB of memory here, {NEEDED / GIB:.0f} GiB are needed: give the container engine's machine more"
        )
    if cpus < WISHED[0] or memory < WISHED[1] * 0.9:
        print(
            f"{cpus} CPUs and {memory / GIB:.0f} GiB: it will work, and take longer than the ten minutes that {WISHED[0]} and {WISHED[1] / GIB:.0f} are meant for"
        )
    return cpus, memory


def configuration(config: dict[str, Any], memory: int) -> dict[str, Any]:
    """The cluster's configuration for a machine.

    Every node sees all of the machine's memory. A quarter of it is reserved on each, so that the scheduler lets tasks wait
    before the kernel ends them. Two workers with three quarters each are more than there is, on purpose: the tasks that run
    side by side, those of the fine-tuning, use about a third of the memory that the judge's tasks ask for.
    """
    reserved = memory // 4
    patch = {"kind": "KubeletConfiguration", "systemReserved": {"memory": f"{reserved // 2**20}Mi"}}
    return config | {"kubeadmConfigPatches": [*config.get("kubeadmConfigPatches", []), yaml.safe_dump(patch)]}


def cluster(tools: Tools, place: Place, memory: int) -> None:
    """The cluster with KFP in it; one that is there is used, and started where it was stopped."""
    log = place.log("cluster")
    if CLUSTER in site.clusters(tools):
        with step("cluster: there already"):
            tools.run("engine", "start", *site.nodes(tools), log=log)
            arguments = ("--name", CLUSTER, "--kubeconfig", str(place.kubeconfig))
            tools.run("kind", "export", "kubeconfig", *arguments, log=log)
    else:
        place.check_ports()
        config = place.state / "cluster.yaml"
        config.write_text(yaml.safe_dump(configuration(place.config, memory)), encoding="utf-8")
        with step("cluster: made"):
            files = ("--config", str(config), "--kubeconfig", str(place.kubeconfig))
            tools.run("kind", "create", "cluster", "--name", CLUSTER, *files, log=log)
    tools.run("kubectl", "wait", "--for=condition=Ready", "node", "--all", "--timeout=180s", log=log)
    for node in site.nodes(tools)[1:]:
        tools.run("engine", "exec", node, "mkdir", "-p", f"{MODELS}/demo", log=log)
        tools.run("engine", "exec", node, "chmod", "1777", MODELS, log=log)
    kubeflow(tools, place)
    tools.run("kubectl", "apply", "-f", str(HERE / "site.yaml"), log=log)


def kubeflow(tools: Tools, place: Place) -> None:
    """Kubeflow Pipelines, standalone; once per content of k8s/kind/kfp, since every time costs two clones from GitHub."""
    log = place.log("kfp")
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KFP.rglob("*.yaml")))).hexdigest()[:16]
    found: Any = tools.json("kubectl", "get", "namespace", NAMESPACE, "--ignore-not-found", "--output", "json")
    if found.get("metadata", {}).get("annotations", {}).get(MARK) == wanted:
        print("Kubeflow Pipelines: applied already")
        return
    # on the server's side: an annotation with the whole of a CRD would be too long for the other way
    apply = ("apply", "--server-side", "--force-conflicts", "-k")
    with step("Kubeflow Pipelines: applied"):
        tools.run("kubectl", *apply, str(KFP / "crds"), log=log)
        tools.run("kubectl", "wait", "--for=condition=Established", "crd", "--all", "--timeout=120s", log=log)
        tools.run("kubectl", *apply, str(KFP), log=log)
        tools.run("kubectl", "annotate", "--overwrite", "namespace", NAMESPACE, f"{MARK}={wanted}", log=log)


def image(tools: Tools, place: Place, named: str) -> str:
    """The image's name in the cluster; it is built unless the user names one that is here. Makes the demo, too."""
    log = place.log("image")
    local = named or "select-moe:dev"
    if named:
        if tools.ask_anyway("engine", "image", "inspect", named).returncode:
            raise UserError(f"image={named} is not here: make image, or leave image= out")
    else:
        with step("image: built"):
            _python(tools, log, "image/build.py", "--target", "cpu", "--tag", local)
    found = tools.ask("engine", "image", "inspect", "--format", "{{.Id}}", local).strip().removeprefix("sha256:")
    tag = f"docker.io/library/{OURS}:kind-{found[:12]}"  # in full, since Podman's short names are localhost/'s
    tools.run("engine", "tag", local, tag, log=log)
    for preset in ("quick", "tiny"):
        folder = place.state.parent / "demo" / preset
        if not (folder / "data").is_dir() or (preset == "quick" and not (folder / "model").is_dir()):
            with step(f"demo: rows{' and model' if preset == 'quick' else ''} of {preset}"):
                model = () if preset == "quick" else ("model=false",)
                _python(tools, log, "-m", "selectmoe", "demo", f"preset={preset}", f"output_dir={folder}", *model)
    return tag


def _python(tools: Tools, log: Path, *words: str) -> None:
    """A Python program of the project; Docker's attestations would be a second manifest, which kind cannot load."""
    tools.places.setdefault("python", sys.executable)
    extra = {"CONTAINER_ENGINE": tools.places["engine"], "BUILDX_NO_DEFAULT_ATTESTATIONS": "1", "PYTHONPATH": str(ROOT)}
    tools.run("python", *words, log=log, extra=extra)


def load(tools: Tools, place: Place, tag: str) -> None:
    """The image into the workers that do not have it: by an archive, which Docker and Podman both write."""
    lacking = [
        node
        for node in site.nodes(tools)[1:]
        if tools.ask_anyway("engine", "exec", node, "crictl", "inspecti", tag).returncode
    ]
    if not lacking:
        print("image: in the cluster already")
        return
    archive = place.state / "image.tar"
    archive.unlink(missing_ok=True)  # Podman adds nothing to an archive that is there
    format = ("--format", "docker-archive") if tools.podman else ()
    with step("image: loaded"):
        try:
            tools.run("engine", "save", *format, "--output", str(archive), tag, log=place.log("image"))
            arguments = ("--name", CLUSTER, "--nodes", ",".join(lacking))
            tools.run("kind", "load", "image-archive", str(archive), *arguments, log=place.log("image"))
        finally:
            archive.unlink(missing_ok=True)


def demo(tools: Tools, place: Place, preset: str) -> None:
    """The demo's rows and model into every worker's model cache, where they are not yet."""
    folder = place.state.parent / "demo" / preset
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = "".join(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in files)
    mark = f"{MODELS}/demo/.{preset}-{hashlib.sha256(listed.encode()).hexdigest()[:16]}"
    target = f"{MODELS}/demo/{preset}"
    log = place.log("demo")
    for node in site.nodes(tools)[1:]:
        if tools.ask_anyway("engine", "exec", node, "test", "-f", mark).returncode == 0:
            continue
        with step(f"demo: {preset} to {node}"):
            tools.run("engine", "exec", node, "rm", "-rf", target, log=log)
            tools.run("engine", "cp", str(folder), f"{node}:{target}", log=log)
            tools.run("engine", "exec", node, "chmod", "-R", "a+rX", target, log=log)
            tools.run("engine", "exec", node, "touch", mark, log=log)


def install(tools: Tools, place: Place, tag: str) -> None:
    """Install the chart, or bring it up to date."""
    values = ("--values", str(CHART / "values-kind.yaml"), "--set-string", f"image.tag={tag.rpartition(':')[2]}")
    with step("chart: installed"):
        arguments = ("--namespace", NAMESPACE, *values, "--wait", "--timeout", "10m")
        tools.run("helm", "upgrade", "--install", RELEASE, str(CHART), *arguments, log=place.log("chart"))


def ready(tools: Tools, place: Place) -> None:
    """Wait until every service is ready, and answers this machine."""
    with step("services: ready"):
        everything = ("deployment", "--all", "--namespace", NAMESPACE, "--timeout=600s")
        tools.run("kubectl", "wait", "--for=condition=Available", *everything, log=place.log("ready"))
        for service, path in (("api", "/apis/v2beta1/healthz"), ("ui", "/"), ("mlflow", "/health")):
            site.answers(place.address(service) + path, 120)


def run(tools: Tools, place: Place, given: dict[str, str]) -> int:
    """Submit the pipeline, follow it, and say what came of it."""
    from k8s.trial import Runs

    site.need_cluster(tools)
    demo(tools, place, given.get("preset", "quick"))
    runs = Runs(tools, place)
    run_id = runs.start({"shards": SHARDS} | given)
    failure = runs.follow(run_id)
    try:
        noted = site.record(run_id, given.get("work_root", site.WORK_ROOT))
    except Unavailable as error:
        raise failure or error from None
    ran = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in noted["tasks"].items())
    print(f"\nexecuted: {ran}")
    if noted["verdict"]:
        print(f"verdict: {noted['verdict']}")
        print(f"report:  {noted['report']} (identity {noted['identity'][:16]})")
    print(f"pages:   {runs.server.link(run_id)} and {place.address('mlflow')}")
    if failure is not None:
        raise failure
    return 0


def test(tools: Tools, place: Place, given: dict[str, str]) -> int:
    """Everything that only a cluster can prove."""
    from k8s import trial

    site.need_cluster(tools)
    demo(tools, place, given.get("preset", "tiny"))
    return trial.test(tools, place, given.get("preset", "tiny"))


def logs(tools: Tools, place: Place, given: dict[str, str]) -> int:
    """Collect what helps to find out what went wrong; no Secret is among it."""
    from k8s import collect

    site.need_cluster(tools)
    folder = Path(given.get("output") or place.state / time.strftime("logs-%Y%m%d-%H%M%S")).resolve()
    print(collect.collect(tools, place, folder))
    return 0


def down(tools: Tools, place: Place, given: dict[str, str]) -> int:
    """Remove the cluster and everything in it; logs, the demo and the image stay."""
    there = CLUSTER in site.clusters(tools)
    if there:
        tools.run("kind", "delete", "cluster", "--name", CLUSTER, log=place.log("cluster"))
    for name in ("kubeconfig", "cluster.yaml", "profile.yaml", "image.tar"):
        (place.state / name).unlink(missing_ok=True)
    print(f"removed: the cluster {CLUSTER} with all its data" if there else "nothing was up")
    return 0


COMMANDS: dict[str, tuple[Callable[[Tools, Place, dict[str, str]], int], tuple[str, ...], tuple[str, ...] | None]] = {
    "up": (up, ("kind", "kubectl", "helm", "git"), ("image",)),
    "run": (run, ("kind", "kubectl"), None),
    "test": (test, ("kind", "kubectl", "helm"), ("preset",)),
    "logs": (logs, ("kind", "kubectl", "helm"), ("output",)),
    "down": (down, ("kind",), ()),
}
"""Command -> what does it, the programs it needs, the keys it takes (None: those of `pipelines submit`)."""


def main(arguments: list[str]) -> int:
    """The command line; exit codes as in docs/design.md, "Errors"."""
    return enter("kind", lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        raise UserError(f"usage: python -m k8s.kind {'|'.join(COMMANDS)} [key=value ...]")
    work, programs, keys = COMMANDS[arguments[0]]
    given = {}
    for word in arguments[1:]:
        key, sign, value = word.partition("=")
        if not sign or (keys is not None and key not in keys):
            raise UserError(f"{arguments[0]}: {word!r} is not understood; known: {', '.join(keys or ()) or 'none'}")
        given[key] = value
    state = Path(os.environ.get("SELECTMOE_STATE") or ROOT / ".selectmoe").resolve() / "kind"
    place = Place(state)
    return work(Tools(programs, place.kubeconfig), place, given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
