"""transformers' own common model tests, from its source distribution: `python -m tests.models.fetch`.

The wheel has no tests. pip downloads the pinned sdist and checks its SHA-256 (`transformers-sdist.txt`); what is taken of it
lies in `build/transformers-tests/`, outside the repository, as the package `transformers_tests`. The sdist lacks the
generation and the export tests that the common tests' module imports: two empty classes stand there, and our own tests of
generation in `test_promises.py`.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = HERE / "transformers-sdist.txt"
CACHE = HERE.parent.parent / "build" / "transformers-tests"
TAKEN = "test_modeling_common.py"
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def pinned() -> tuple[str, str]:
    """Version and SHA-256 of the sdist."""
    found = re.search(r"transformers==(\S+) --hash=sha256:([0-9a-f]{64})", PIN.read_text(encoding="utf-8"))
    assert found, f"{PIN} holds no pin"
    return found[1], found[2]


def fetch(cache: Path = CACHE) -> Path:
    """The folder that holds the package `transformers_tests`, downloaded where it is not there yet."""
    version, digest = pinned()
    sdist = cache / f"transformers-{version}.tar.gz"
    if not sdist.is_file() or hashlib.sha256(sdist.read_bytes()).hexdigest() != digest:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--require-hashes", "-r", str(PIN), "-d", str(cache)], check=True)
    package = cache / version / "transformers_tests"
    for name in ("", "exporters", "generation"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"transformers-{version}/tests/{TAKEN}")
        assert member is not None, TAKEN
        (package / TAKEN).write_bytes(member.read())
    for name, missing in ABSENT.items():
        (package / name).write_text(f'class {missing}:\n    """Not in the sdist."""\n', encoding="utf-8")
    return package.parent


if __name__ == "__main__":
    print(fetch())
