"""pytest tests/unit/image/test_licences.py"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PROGRAM = Path(sys.executable).parent / "pip-licenses"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "--summary"], cwd=folder, capture_output=True, text=True)


def test_what_is_installed_is_under_licences_that_we_allow(tmp_path):
    done = check(ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text.replace("LGPL-3.0-only;", ""), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1
    assert "psycopg" in done.stderr
