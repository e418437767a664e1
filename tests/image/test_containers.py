"""The compiled pipeline, every task in a hardened container, against real MLflow and S3 servers: the same identities.

Beside it the same rows through `selectmoe run` on this machine, and through `selectmoe run` in the image.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine import HARDENED, said

from pipelines import containers, servers
from selectmoe import manifest

ROOT = Path(__file__).resolve().parent.parent.parent


def identities(folder: Path) -> set[tuple[str, str]]:
    """Stage and identity of every output in a folder; `check` is not compared: it knows the folders' names."""
    found = [manifest.read_manifest(path.parent, verify=False) for path in folder.rglob(manifest.NAME)]
    return {(one.stage, one.identity) for one in found if one.stage != "check"}


class Pipeline:
    """`python -m pipelines.local` with a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        own = (*servers.PORTS.values(), "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")
        self.environment = {name: value for name, value in os.environ.items() if name not in own}
        self.environment["SELECTMOE_STATE"] = str(state)

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "pipelines.local", *arguments]
        with subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:  # also of a test that took too long
                process.terminate()

    def call(self, *arguments: str) -> str:
        with self.started(*arguments) as process:
            text, _ = process.communicate()
        assert process.returncode == 0, text[-6000:]
        return text

    def interrupted(self, stage: str, *arguments: str) -> int:
        """The exit code of a run that is sent SIGINT when a task of a stage has begun."""
        with self.started(*arguments) as process:
            while f'"{stage}"' not in self.events():
                assert process.poll() is None, "the run ended"
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            process.communicate()
        return process.returncode

    def events(self) -> str:
        path = self.state / "events.jsonl"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def left(self) -> str:
        """The containers that still run."""
        return said("ps", "--quiet", "--filter", f"label={containers.LABEL}={self.state}")


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    found = Pipeline(tmp_path / "state")
    yield found
    found.call("down")


def test_the_pipeline_in_containers_gives_the_identities_of_the_local_run(
    image: str, rows: Path, settings: tuple[str, ...], here: Path, pipeline: Pipeline
) -> None:
    command = ("run", "runner=docker", f"image={image}", *settings, f"data={rows}")
    assert pipeline.interrupted("pretrain", *command) == 128 + signal.SIGINT
    assert pipeline.left() == ""
    started = time.monotonic()
    text = pipeline.call(*command)
    print(f"\nthe pipeline in containers: {time.monotonic() - started:.0f} s", file=sys.stderr)
    assert "verdict: " in text
    assert pipeline.left() == ""

    outputs = pipeline.state / "kfp"
    assert identities(outputs) == identities(here)
    selected = next(outputs.glob("*/select/selections/selected/selected_data.jsonl"))
    assert selected.read_bytes() == (here / "select" / "selected_data.jsonl").read_bytes()
    report = Path(next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("report:"))).parent
    assert (report / "verdict.json").read_bytes() == (here / "report" / "verdict.json").read_bytes()

    log = (pipeline.state / "run.log").read_text(encoding="utf-8")
    assert f"Found image '{image}'" in log
    assert "pip install" not in log
    owners = {path.stat().st_uid for path in report.iterdir()}
    assert owners == {int(containers.user().split(":")[0])}, "the tasks were not root"
    stored = {path.name for path in (pipeline.state / "s3").rglob("*") if path.is_file()}
    assert {"report.html", "selected_data.jsonl", "full_rank_weights.safetensors"} <= stored


def test_a_run_in_one_container_without_a_network_gives_them_too(
    image: str, rows: Path, settings: tuple[str, ...], here: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    mounts = ["--volume", f"{rows}:/data:ro", "--volume", f"{tmp_path}:/out"]
    command = ["selectmoe", "run", *settings, "data=/data", "output_dir=/out/run"]
    started = time.monotonic()
    said("run", "--rm", *HARDENED, "--network", "none", *mounts, image, *command, timeout=900)
    print(f"\nselectmoe run, in the image: {time.monotonic() - started:.0f} s", file=sys.stderr)
    assert identities(tmp_path / "run") == identities(here)
