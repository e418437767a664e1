"""The engine, the image and the rows that the image's tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import engine
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def settings() -> tuple[str, ...]:
    """The run that is made on this machine, in containers, and in one container: everything forks, and few tasks wait."""
    return ("preset=tiny", "shards=2", "arms=[selected,random]")


@pytest.fixture(scope="session", autouse=True)
def reference(
    rows: Path, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`selectmoe run` on this machine, started before the image is built, which mostly waits for the network and the disk."""
    folder = tmp_path_factory.mktemp("here")
    command = [sys.executable, "-m", "selectmoe", "run", *settings, f"data={rows}", f"output_dir={folder}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield process, folder
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def here(reference: tuple[subprocess.Popen[bytes], Path]) -> Path:
    """What `selectmoe run` makes on this machine."""
    process, folder = reference
    assert process.wait() == 0, "selectmoe run failed: see the lines above"
    return folder


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The CPU image, built from this checkout; `SELECTMOE_TEST_IMAGE` names one that is tested as it is."""
    tag = os.environ.get("SELECTMOE_TEST_IMAGE", "") or "select-moe:test"
    with engine.running():
        if os.environ.get("SELECTMOE_TEST_IMAGE"):
            yield tag
            return
        started = time.monotonic()
        base = engine.base()
        ready = time.monotonic()
        command = [sys.executable, "image/build.py", "--target", "cpu", "--tag", tag, "--base", base]
        environment = os.environ | {"CONTAINER_ENGINE": engine.CLIENT}
        done = subprocess.run([*command, "--network", "host"], cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, "the build failed: see the lines above"
        print(f"\nbase {base}: {ready - started:.0f} s; build: {time.monotonic() - ready:.0f} s", file=sys.stderr)
        yield tag


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's smallest rows, made here: the packages that they come from are not in the image."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "selectmoe", "demo", "preset=tiny", "model=false", f"output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"
