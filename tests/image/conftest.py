"""The engine, the image and the rows that the image's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import engine
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


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
