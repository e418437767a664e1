"""Build the image with the Docker or Podman that is here: what `make image` calls. Standard library only.

    python3 image/build.py                                   # --target cpu --tag select-moe:dev
    python3 image/build.py --target gpu --tag select-moe:dev-gpu
    python3 image/build.py --base registry.example.org/python:3.11-slim-bookworm

What a build machine has of its own comes from its environment and goes into the build as arguments of the stages that
install, so that none of it is in the image: `PIP_INDEX_URL`, and `PIP_FIND_LINKS` (a page of links, or a folder, which is
then served to the build over loopback) in the place of the page with torch's CPU build.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = 8497
"""Where a folder of wheels is served, if it is free: the same address again finds the same layers in the cache."""


def engine() -> str:
    """The container engine: `CONTAINER_ENGINE`, else docker, else podman.

    Raises:
        SystemExit: there is none.
    """
    for name in filter(None, (os.environ.get("CONTAINER_ENGINE", ""), "docker", "podman")):
        if found := shutil.which(name):
            return found
    raise SystemExit(
        "image: neither docker nor podman is installed; set CONTAINER_ENGINE to a client that speaks like them"
    )


def revision() -> str:
    """The commit that is built, `-dirty` behind it where files differ; `unknown` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as a page of links on loopback.

    Args:
        folder: wheels.

    Yields:
        The page's address.
    """
    handler = functools.partial(Quiet, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def command(options: argparse.Namespace, links: str) -> list[str]:
    """The build command.

    Args:
        options: target, tag, base, source.
        links: page of links with torch's CPU build; empty: the Dockerfile's.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = {
        "BASE": options.base,
        "VERSION": project["version"],
        "REVISION": revision(),
        "SOURCE": options.source,
        "PIP_INDEX_URL": os.environ.get("PIP_INDEX_URL", ""),
        "TORCH_WHEELS": links if options.target == "cpu" else "",
    }
    words = [engine(), "build", "--target", options.target, "--tag", options.tag]
    if options.network:
        words += ["--network", options.network]
    for name, value in given.items():
        words += ["--build-arg", f"{name}={value}"] if value else []
    return [*words, str(ROOT)]


def main(arguments: list[str]) -> int:
    """The command line; the exit code is the engine's."""
    parser = argparse.ArgumentParser(prog="image/build.py", description="Build Select-MoE's image.")
    parser.add_argument("--target", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tag", default="select-moe:dev")
    parser.add_argument("--base", default="", help="the Python base image; default: the Dockerfile's")
    parser.add_argument("--source", default="", help="where the source is published (a label)")
    parser.add_argument("--network", default="", help="network of the build's steps, such as host")
    options = parser.parse_args(arguments)
    links = os.environ.get("PIP_FIND_LINKS", "")
    with contextlib.ExitStack() as stack:
        if Path(links).is_dir() and links and options.target == "cpu":
            links = stack.enter_context(served(Path(links)))
            options.network = "host"  # from where loopback is this machine's
        buildkit = {"DOCKER_BUILDKIT": "1"} | os.environ  # what older Docker clients have to be told
        return subprocess.run(command(options, links), env=buildkit, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
