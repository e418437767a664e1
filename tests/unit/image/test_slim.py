"""pytest tests/unit/image/test_slim.py"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from image.slim import slim, unneeded


def test_what_only_a_compiler_or_a_test_reads_goes_and_the_rest_works_compiled(tmp_path):
    package = tmp_path / "lib" / "site-packages" / "thing"
    for name in ("tests/test_a.py", "tests/deep/data.h", "core.h", "core.a", "part/tests/x.json"):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    for name in ("__init__.py", "testing.py", "data.json", "part/__init__.py", "contests.py"):
        (package / name).write_text("x = 1\n")
    gone = [path.relative_to(package).as_posix() for path in unneeded(tmp_path)]
    assert gone == ["core.a", "core.h", "part/tests", "tests"]
    assert slim(tmp_path) == 5 * len("x = 1\n")
    left = sorted(p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert left == ["__init__.py", "contests.py", "data.json", "part/__init__.py", "testing.py"]
    (package / "testing.py").write_text("x = 2\n")  # a compiled file counts, whatever became of its source
    code = "import thing.testing; print(thing.testing.x)"
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_what_torch_opens_when_it_is_imported_stays():
    torch = Path(importlib.util.find_spec("torch").origin).parent
    gone = {path.relative_to(torch).as_posix() for path in unneeded(torch)}
    assert gone.isdisjoint({"bin", "bin/torch_shm_manager", "lib", "lib/libtorch_cpu.so"})
