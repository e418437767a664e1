"""Checkpoints on disk: find one, read its config, stream its tensors shard by shard, write one with stable bytes.

No command runs this module; `upcycle`, `convert`, `verify` and `warmup` do. A source is a local folder, `s3://bucket/prefix`
or the hub name of a model. At most one shard is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import cache
from selectmoe.errors import UserError
from selectmoe.shards import METADATA as METADATA
from selectmoe.shards import Stored, read_header

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
"""Files that say on which terms the weights may be used (patterns)."""
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", *LICENCES)
"""What travels with the weights, byte for byte (names and patterns)."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found: its folder and the content of its `config.json`."""

    path: Path
    config: dict[str, Any]

    @property
    def shards(self) -> list[Path]:
        """The safetensors files that hold the weights, in order of their names."""
        return _shards(self.path)

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name and where its bytes lie, shard by shard; headers are read, weights are not.

        Raises:
            UserError: a shard is damaged, or a name comes twice.
        """
        found: dict[str, Stored] = {}
        for shard in self.shards:
            for name, tensor in read_header(shard).items():
                if name in found:
                    raise UserError(f"{self.path} holds the tensor {name} twice")
                found[name] = tensor
        return found

    def misplaced(self, tensors: dict[str, Stored]) -> list[str]:
        """The names of which the index says another shard than the one that holds them, or which it does not know."""
        if not (self.path / INDEX).is_file():
            return []
        named = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        there = {name: tensor.path.name for name, tensor in tensors.items()}
        return sorted(name for name in {*named, *there} if named.get(name) != there.get(name))


def resolve(source: str, model_types: tuple[str, ...], key: str, advice: str = "") -> Source:
    """Find a checkpoint: a local folder, or one on S3 or the hub, which is brought here (`selectmoe.cache`).

    Args:
        source: a path, ``s3://bucket/prefix`` or ``OWNER/NAME``.
        model_types: the values of `model_type` that are accepted.
        key: the configuration key that named the source, for messages.
        advice: how to get what would be right.

    Raises:
        UserError: nothing is there, it holds no safetensors weights, or it is another kind of model.
    """
    path, _ = cache.locate(source, key)
    return read(path, f"{key}={source}", model_types, advice)


def read(path: Path, where: str, model_types: tuple[str, ...], advice: str = "") -> Source:
    """The checkpoint in a folder.

    Args:
        path: the folder.
        where: how the user named it, for messages.
        model_types: as in `resolve`.
        advice: as in `resolve`.

    Raises:
        UserError: it is none, holds no safetensors weights, or it is another kind of model.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where} holds no config.json: it is not a transformers checkpoint") from None
    except ValueError as error:
        raise UserError(f"{where}: config.json is not JSON ({error})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in model_types:
        hint = f"; {advice}" if advice else ""
        expected = " or ".join(model_types) if len(model_types) < 5 else f"one of {len(model_types)} others"
        raise UserError(f"{where} has model_type {kind!r}, expected {expected}{hint}")
    if not _shards(path):
        raise UserError(f"{where} holds no safetensors weights (model.safetensors, or shards and {INDEX})")
    return Source(path, config)


def _shards(path: Path) -> list[Path]:
    index = path / INDEX
    if not index.is_file():
        return [path / "model.safetensors"] if (path / "model.safetensors").is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} cannot be read as an index of shards") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file name")
        if not (path / name).is_file():
            raise UserError(f"{path} lacks the shard {name}, which {INDEX} names")
    return [path / name for name in names]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, shard by shard, by name inside a shard.

    Raises:
        UserError: a shard cannot be read, or a name comes twice.
    """
    from safetensors import SafetensorError, safe_open

    seen: set[str] = set()
    for shard in _shards(path):
        try:
            with safe_open(str(shard), framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in seen:
                        raise UserError(f"{path} holds the tensor {name} twice")
                    seen.add(name)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{shard} cannot be read as safetensors: {error}") from None


def tensor_places(path: Path) -> dict[str, Path]:
    """Tensor name -> the shard that holds it, from the shards' headers alone.

    Raises:
        UserError: a shard cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    for shard in _shards(path):
        try:
            with safe_open(str(shard), framework="pt") as file:
                places |= dict.fromkeys(file.keys(), shard)
        except SafetensorError as error:
            raise UserError(f"{shard} cannot be read as safetensors: {error}") from None
    return places


def write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a stream of tensors as safetensors, with an index where there is more than one shard.

    Args:
        directory: an existing folder.
        tensors: (name, tensor); the order decides what lies in which shard.
        shard_bytes: size at which a shard is closed; one shard is in memory at a time.

    Raises:
        ValueError: a name comes twice.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(shards):05}", metadata=METADATA)
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        if name in pending or any(name in shard for shard in shards):
            raise ValueError(f"the tensor {name} was written before")
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
    flush()
    total = len(shards)
    if total == 1:
        (directory / "shard-00000").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    for i, name in enumerate(names):
        (directory / f"shard-{i:05}").rename(directory / name)
    size = sum(sum(shard.values()) for shard in shards)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation config and licence byte for byte; returns the names of the files."""
    names = companions(source)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def companions(path: Path) -> list[str]:
    """The names of the files in a folder that travel with the weights."""
    return [name for pattern in COMPANIONS for name in sorted(p.name for p in path.glob(pattern) if p.is_file())]
