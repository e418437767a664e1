"""An engine that is started for the tests leaves nothing behind, also when they fail: pytest tests/image/test_engine.py."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import engine
import pytest


def left(folder: Path) -> list[str]:
    """What is mounted below a folder, and the processes in whose command it is named."""
    found = [line for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines() if str(folder) in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [path.read_text(errors="replace")] if str(folder) in path.read_text(errors="replace") else []
    return found


def test_nothing_is_left_of_an_engine_in_which_a_test_failed(tmp_path: Path) -> None:
    system = [word for path in ("/usr", "/lib", "/lib64") for word in ("--volume", f"{path}:{path}:ro")]
    with pytest.raises(ZeroDivisionError), engine.started(tmp_path):
        empty = subprocess.run(["tar", "-cT", "/dev/null"], capture_output=True, check=True).stdout
        subprocess.run([engine.CLIENT, "import", "-", "empty"], input=empty, capture_output=True, check=True)
        engine.said("run", "--detach", "--network", "host", *system, "empty", "/usr/bin/sleep", "600")
        assert any("netns/default" in line for line in left(tmp_path)), "what the engine leaves mounted"
        raise ZeroDivisionError
    assert left(tmp_path) == []
