"""Make a folder of installed packages as small as it can be without loss, and compile it: part of the image's build.

    python image/slim.py /opt/venv

What goes: tests of packages, headers, static libraries and what else only a compiler reads. What stays is compiled with
hashes that nobody checks again: modules load as fast from a read-only file system, whatever their files' times are.
"""

from __future__ import annotations

import compileall
import py_compile
import shutil
import sys
from pathlib import Path

FOLDERS = ("tests", "torch/include", "torch/share", "torch/test", "pyarrow/include", "pyarrow/src")
"""Folders that no program of ours opens, as the end of a path."""
SUFFIXES = (".a", ".c", ".cpp", ".h", ".hpp", ".cuh", ".pxd", ".pyx", ".cmake")
"""Files that only a compiler reads."""


def unneeded(root: Path) -> list[Path]:
    """The folders and files below `root` that go; none lies in another.

    Args:
        root: an environment or a folder of packages.
    """
    found: set[Path] = set()
    for path in sorted(root.rglob("*")):
        if not found.isdisjoint(path.parents) or path.is_symlink():
            continue
        inside = f"/{path.relative_to(root).as_posix()}"
        folder = path.is_dir() and any(inside.endswith(f"/{name}") for name in FOLDERS)
        if folder or (path.suffix in SUFFIXES and path.is_file()):
            found.add(path)
    return sorted(found)


def slim(root: Path) -> int:
    """Remove what is not needed, compile the rest.

    Args:
        root: an environment or a folder of packages.

    Returns:
        The bytes that were removed.
    """
    freed = 0
    for path in unneeded(root):
        if path.is_dir():
            freed += sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            shutil.rmtree(path)
        else:
            freed += path.stat().st_size
            path.unlink()
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(root, quiet=2, workers=0, invalidation_mode=mode, maxlevels=30)
    return freed


if __name__ == "__main__":
    print(f"removed {slim(Path(sys.argv[1])) / 1e6:.0f} MB, compiled the rest")
