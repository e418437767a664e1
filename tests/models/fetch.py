"""transformers' own common model tests, from its source distribution: `python -m tests.models.fetch`.

The wheel has no tests. pip downloads the pinned sdist and checks its SHA-256 (`transformers-sdist.txt`); what is taken of it
lies in `build/transformers-tests/`, outside the repository, as the package `transformers_tests`. The sdist lacks the
generation and the export tests that the common tests' module imports: two empty classes stand there, and our own tests of
generation in `test_promises.py`.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tarfile
import tempfile
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
    """The folder that holds the package `transformers_tests`; made beside its place and renamed where it is not there yet."""
    version, digest = pinned()
    done = cache / f"{version}-{digest[:16]}"
    if done.is_dir():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--require-hashes", "-r", str(PIN), "-d", temporary], check=True)
        unpack(folder / f"transformers-{version}.tar.gz", folder / "new" / "transformers_tests")
        with contextlib.suppress(OSError):  # another process was first
            (folder / "new").rename(done)
    return done


def unpack(sdist: Path, package: Path) -> None:
    """Write the package: the common tests, and the empty classes that they import."""
    for name in ("", "exporters", "generation"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/tests/{TAKEN}")
        assert member is not None, TAKEN
        (package / TAKEN).write_bytes(member.read())
    for name, missing in ABSENT.items():
        (package / name).write_text(f'class {missing}:\n    """Not in the sdist."""\n', encoding="utf-8")


if __name__ == "__main__":
    print(fetch())
