"""Our transfer to and from S3 against plain boto3: the same real server (nanio), the same files, the same concurrency.

    python -m bench.s3 [--rounds 3] [--megabytes 512] [--files 200]

Ours proves every byte both ways (SHA-256 of what is read, MD5 against the server's ETag); boto3's own does not. Both
take turns; printed is the best round of each, in MB/s, and the ratio ours : boto3. The goal is 0.8.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from selectmoe.download import PARALLEL, PART
from selectmoe.storage import S3Store

BUCKET = "bench"


@contextmanager
def server(folder: Path) -> Iterator[None]:
    """A real S3 server over a folder; the environment of this process leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / BUCKET).mkdir(parents=True)
    keys = {"NANIO_ACCESS_KEY": "bench", "NANIO_SECRET_KEY": "bench-secret"}
    command = [
        shutil.which("nanio", path=os.path.dirname(sys.executable)) or "nanio",
        "serve",
        "--data-dir",
        str(folder),
    ]
    with open(folder.parent / "server.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=os.environ | keys, stdout=log, stderr=log
        )
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def make(folder: Path, files: int, megabytes: int) -> dict[str, Path]:
    """Files of random bytes."""
    folder.mkdir(parents=True)
    chunk = random.Random(0).randbytes(1 << 20)
    made = {}
    for n in range(files):
        path = folder / f"{n}.bin"
        with open(path, "wb") as file:
            for at in range(megabytes):
                file.write(chunk[at % 1000 :] + chunk[: at % 1000])
        made[path.name] = path
    return made


def plain(files: dict[str, Path], target: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Up and down with boto3's own transfer: parts in parallel for one file, files in parallel for many."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=2 * PARALLEL))
    config = TransferConfig(max_concurrency=PARALLEL if len(files) == 1 else 1, multipart_chunksize=PART)

    def up() -> None:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda n: client.upload_file(str(files[n]), BUCKET, f"plain/{n}", Config=config), files))

    def down() -> None:
        target.mkdir(parents=True)
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda n: client.download_file(BUCKET, f"plain/{n}", str(target / n), Config=config), files))

    return up, down


def ours(files: dict[str, Path], target: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Up and down with `selectmoe.storage`."""
    store = S3Store(f"s3://{BUCKET}/ours")

    def up() -> None:
        store.put_files(files, "up")

    def down() -> None:
        store.fetch_files([(entry, target / entry.name, "") for entry in store.entries()], "down")

    return up, down


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(root: Path, files: dict[str, Path], title: str, rounds: int) -> None:
    """Both ways, both kinds, in turns; one line for each way."""
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, kind in (("boto3", plain), ("ours", ours)):
            target = root / "down"
            up, down = kind(files, target)
            for way, work in (("up", up), ("down", down)):
                best[way, name] = min(seconds(work), best.get((way, name), float("inf")))
            for path in files.values():
                if (target / path.name).read_bytes() != path.read_bytes():
                    raise SystemExit(f"{name}: {path.name} came back otherwise")
            shutil.rmtree(target)
            shutil.rmtree(root / "server" / BUCKET)
            (root / "server" / BUCKET).mkdir()
    for way in ("up", "down"):
        rates = {name: size / best[way, name] for name in ("ours", "boto3")}
        ratio = rates["ours"] / rates["boto3"]
        print(
            f"{title:<16} {way:<5} ours {rates['ours']:6.0f} MB/s   boto3 {rates['boto3']:6.0f} MB/s   ratio {ratio:.2f}"
        )


def main() -> None:
    """Make the files, start the server, print the table."""
    parser = argparse.ArgumentParser(description="our S3 transfer against boto3's own")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the one large file")
    parser.add_argument("--files", type=int, default=200, help="number of files of 1 MB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-s3-") as folder:
        root = Path(folder)
        with server(root / "server"):
            large, many = make(root / "large", 1, arguments.megabytes), make(root / "many", arguments.files, 1)
            compare(root, large, f"1 x {arguments.megabytes} MiB", arguments.rounds)
            compare(root, many, f"{arguments.files} x 1 MiB", arguments.rounds)


if __name__ == "__main__":
    main()
