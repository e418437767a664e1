"""What converting a large checkpoint costs: memory, time, and what a kill costs. `make bench-convert`.

    python -m bench.convert [layers=4] [shard_mb=1200] [folder=DIR]

A checkpoint in OLMoE-1B-7B's own layout (H 2048, 64 experts of width 1024 in tensors of their own, bfloat16, several
shards) with random bytes is made on the fly: 3.6 GB with four layers. Then `selectmoe convert` runs as a process of its own,
as it is, with another dtype, once killed by SIGKILL in the middle and started again, and to a real S3 server beside it.

Aims: peak memory at most the largest source shard plus 500 MB; the result's tensors are the source's and the gates, byte by
byte; a killed run writes no whole shard again and ends with the same identity. Time is stated against the bound: reading the
source twice (to identify it, to copy it) and writing and reading the result once, with nothing else done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.s3 import BUCKET, server
from selectmoe import checkpoint, manifest, shards
from selectmoe.convert import gate_name, olmoe_shapes

ALLOWED = 500 << 20
"""Bytes above the largest shard that the process may use."""


def config(layers: int) -> dict[str, Any]:
    """OLMoE-1B-7B's configuration with another number of layers."""
    sizes: dict[str, Any] = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
    }
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8}
    return {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "torch_dtype": "bfloat16"} | sizes | heads


def noise(size: int) -> Iterator[bytes]:
    """So many random bytes."""
    while size:
        step = min(size, shards.CHUNK)
        yield os.urandom(step)
        size -= step


def make(folder: Path, layers: int, shard_bytes: int) -> None:
    """Write the checkpoint, shard by shard."""
    folder.mkdir()
    checkpoint.write_json(folder / "config.json", config(layers))
    (folder / "tokenizer.json").write_text("{}")
    files: list[list[shards.Planned]] = [[]]
    for name, shape in olmoe_shapes(config(layers), fused=False).items():
        size = 2
        for n in shape:
            size *= n
        if sum(t.size for t in files[-1]) + size > shard_bytes:
            files.append([])
        files[-1].append(shards.Planned(name, "BF16", shape, size, lambda size=size: noise(size)))  # type: ignore[misc]
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        shards.write(folder / name, tensors)
    weight_map = {t.name: name for name, tensors in zip(names, files, strict=True) for t in tensors}
    checkpoint.write_json(folder / checkpoint.INDEX, {"metadata": {}, "weight_map": weight_map})


def weights(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def convert(source: Path, out: Path | str, *keys: str, kill_at: int = 0) -> tuple[float, int]:
    """Run `selectmoe convert`, or kill it once so many shards are written.

    Returns:
        Seconds, and the largest resident set in bytes.

    Raises:
        RuntimeError: it failed, or was done before it could be killed.
    """
    words = [sys.executable, "-m", "selectmoe.cli", "convert", f"source_model={source}", f"output_dir={out}", *keys]
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    if kill_at:
        staging = Path(out) / ".work" / "staging"
        while not ((written := weights(staging)) and len(written) >= kill_at and list(staging.glob("*.part"))):
            if process.poll() is not None:
                raise RuntimeError("it was done before it could be killed")
            time.sleep(0.01)
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if kill_at else 0):
        raise RuntimeError(f"convert ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def bound(source: Path, folder: Path) -> float:
    """Seconds that the reading, writing and hashing alone take."""
    started = time.monotonic()
    for path in weights(source):
        manifest.sha256_file(path)
        with open(path, "rb", buffering=0) as read, open(folder / "copy", "wb", buffering=0) as write:
            while data := read.read(shards.CHUNK):
                write.write(data)
            os.fsync(write.fileno())
        manifest.sha256_file(folder / "copy")
    (folder / "copy").unlink()
    return time.monotonic() - started


def proved(source: Path, out: Path, layers: int) -> int:
    """Compare every tensor; returns how many bytes of tensors the result has more than the source.

    Raises:
        RuntimeError: one is missing or differs.
    """
    before, after = (checkpoint.Source(path, {}).tensors() for path in (source, out))
    for name, tensor in before.items():
        if why := shards.difference(shards.copied(name, tensor), after[name]):
            raise RuntimeError(f"{name}: {why}")
    gates = {gate_name(n, kind) for n in range(layers) for kind in ("weight", "bias")}
    if {*after} != {*before} | gates:
        raise RuntimeError("the result has other tensors than the source and the gates")
    return sum(t.size for t in after.values()) - sum(t.size for t in before.values())


def main(layers: int, shard_bytes: int, folder: Path) -> bool:
    """Measure and print a table; whether the aims are reached."""
    source, whole, killed, wide = (folder / name for name in ("source", "whole", "killed", "wide"))
    make(source, layers, shard_bytes)
    largest = max(path.stat().st_size for path in weights(source))
    total = sum(path.stat().st_size for path in weights(source))
    print(f"source: {total / 1e9:.2f} GB in {len(weights(source))} shards, the largest {largest / 1e9:.2f} GB")
    floor = bound(source, folder)
    print(f"bound: {floor:.1f} s; allowed memory: {(largest + ALLOWED) / 1e6:.0f} MB")
    fine = True

    def row(what: str, seconds: float, memory: int) -> None:
        nonlocal fine
        fine = fine and memory <= largest + ALLOWED
        print(f"{what:<28}{seconds:7.1f} s ({seconds / floor:4.2f} of the bound){memory / 1e6:8.0f} MB at most")

    row("convert", *convert(source, whole))
    more = proved(source, whole, layers)
    gates = layers * (2048 + 1) * 4
    print(f"result: the source's tensors byte by byte and {more} bytes of gates (expected {gates})")
    half = len(weights(source)) // 2
    row(f"killed after {half} shards", *convert(source, killed, kill_at=half))
    written = {path.name: path.stat().st_mtime_ns for path in weights(killed / ".work" / "staging")}
    row("started again", *convert(source, killed))
    again = [n for n, at in written.items() if (killed / n).stat().st_mtime_ns != at]
    same = manifest.read_manifest(killed).identity == manifest.read_manifest(whole).identity
    print(f"whole shards written again: {len(again)} of {len(written)}; same identity: {same}")
    row("convert dtype=float32", *convert(source, wide, "dtype=float32"))
    with server(folder / "buckets"):
        row("convert output_dir=s3://", *convert(source, f"s3://{BUCKET}/out"))
    sent = proved(source, folder / "buckets" / BUCKET / "out", layers)
    return fine and more == gates == sent and same and not again


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as place:
        reached = main(int(given.get("layers", "4")), int(given.get("shard_mb", "1200")) * 10**6, Path(place))
    sys.exit(0 if reached else 3)
