"""Safetensors files as ranges of bytes: headers read, tensors written, cast and compared, `CHUNK` bytes at a time.

No command runs this module; `convert` writes with it and `verify` compares, so that neither ever holds a whole tensor,
let alone a shard. The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, data_offsets),
then the tensors' bytes one after the other (https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe.errors import Unavailable, UserError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 4 << 20
"""Bytes in memory at once."""
METADATA = {"format": "pt"}
"""The single metadata key of what we write: several come out in changing order."""
FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Codes of the floating-point dtypes, and their names in torch."""
CODES = {name: code for code, name in FLOATS.items()}
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of a value; 1 for every other dtype."""


def _exactly(file: Any, size: int) -> bytearray:
    """So many bytes of an unbuffered file, which may give less at a time."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = file.readinto(view)
        if not got:
            raise OSError(f"{file.name} ended before the bytes that its header promises")
        view = view[got:]
    return data


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype's code, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int

    def chunks(self) -> Iterator[bytes | bytearray]:
        """The bytes, `CHUNK` at a time."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            left = self.size
            while left:
                data = _exactly(file, min(CHUNK, left))
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[bytes | bytearray]]
    """Gives its bytes, in order."""


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors in a safetensors file, in the order of their bytes; also proves that the file is whole.

    Raises:
        UserError: it is no safetensors file, or not whole.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        found = [(*map(int, entry["data_offsets"]), name, entry) for name, entry in header.items()]
        found.sort(key=lambda item: item[:3])
        tensors = {
            name: Stored(entry["dtype"], tuple(map(int, entry["shape"])), path, 8 + length + start, end - start)
            for start, end, name, entry in found
        }
        promised = 8 + length + max(end for _, end, _, _ in found)
    except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a safetensors file ({type(error).__name__}): copy it again") from None
    if size != promised:
        raise UserError(
            f"{path} has {size} bytes, its header promises {promised}: it was not copied whole; copy it again"
        )
    return tensors


def copied(name: str, tensor: Stored) -> Planned:
    """A tensor as it is."""
    return Planned(name, tensor.dtype, tensor.shape, tensor.size, tensor.chunks)


def cast(name: str, tensor: Stored, dtype: str) -> Planned:
    """A floating-point tensor in another dtype (torch's name); one that is not floating-point as it is."""
    code = CODES[dtype]
    if tensor.dtype not in FLOATS or tensor.dtype == code:
        return copied(name, tensor)
    size = math.prod(tensor.shape) * WIDTHS.get(code, 1)
    return Planned(name, code, tensor.shape, size, lambda: _cast_chunks(name, tensor, dtype))


def _cast_chunks(name: str, tensor: Stored, dtype: str) -> Iterator[bytes]:
    import torch

    before, after = getattr(torch, FLOATS[tensor.dtype]), getattr(torch, dtype)
    for data in tensor.chunks():  # CHUNK is a multiple of every width
        values = torch.frombuffer(data, dtype=before)
        out = values.to(after)
        if after == torch.float16 and (out.isinf() & ~values.isinf()).any():
            raise UserError(f"dtype={dtype}: the tensor {name} holds values that it cannot: take bfloat16 or float32")
        yield _bytes(out)


def given(name: str, tensor: Tensor) -> Planned:
    """A tensor in memory."""
    tensor = tensor.detach().cpu().contiguous()
    code = CODES[str(tensor.dtype).removeprefix("torch.")]
    return Planned(name, code, tuple(tensor.shape), tensor.nbytes, lambda: [_bytes(tensor)])


def _bytes(tensor: Tensor) -> bytes:
    import torch

    found: bytes = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def aligned(tensors: Iterable[Planned]) -> list[Planned]:
    """The order in a file: wide dtypes first, so that every tensor is aligned; otherwise as given."""
    return sorted(tensors, key=lambda t: -WIDTHS.get(t.dtype, 1))


def header(tensors: Iterable[Planned]) -> bytes:
    """What stands before the tensors' bytes."""
    entries: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_size(tensors: list[Planned]) -> int:
    """Bytes of the file that `write` makes of these."""
    return len(header(tensors)) + sum(tensor.size for tensor in tensors)


def write(path: Path, tensors: list[Planned]) -> None:
    """Write a safetensors file and wait until the disk has it.

    Args:
        path: the file.
        tensors: in the order of `aligned`.

    Raises:
        Unavailable: the disk is full; nothing is left of the file.
    """
    try:
        with open(path, "wb", buffering=0) as file:
            _all(file, header(tensors))
            for tensor in tensors:
                written = 0
                for data in tensor.chunks():
                    _all(file, data)
                    written += len(data)
                if written != tensor.size:
                    raise RuntimeError(f"{tensor.name}: {written} bytes instead of {tensor.size}")
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise Unavailable(f"{path} cannot be written ({error.strerror}); the same command goes on from here") from None


def _all(file: Any, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:  # an unbuffered file may take less than it is given
        view = view[file.write(view) :]


def difference(before: Planned, after: Stored) -> str:
    """Why a stored tensor is not the one that is expected; empty where it is, to the bit."""
    if before.dtype != after.dtype:
        return f"dtype {_named(before.dtype)} became {_named(after.dtype)}"
    if before.shape != after.shape:
        return f"shape {list(before.shape)} became {list(after.shape)}"
    if before.size != after.size:
        return f"{before.size} bytes became {after.size}"
    return _differing(before.chunks(), after, WIDTHS.get(after.dtype, 1))


def _named(code: str) -> str:
    return FLOATS.get(code, code)


def _differing(expected: Iterable[bytes | bytearray], after: Stored, width: int) -> str:
    import numpy as np

    total, differing, first = after.size // width, 0, -1
    with open(after.path, "rb", buffering=0) as file:
        file.seek(after.start)
        at = 0
        for data in expected:
            found = _exactly(file, len(data))
            if found != data:
                pairs = (np.frombuffer(side, np.uint8).reshape(-1, width) for side in (data, found))
                where = np.flatnonzero((next(pairs) != next(pairs)).any(axis=1))
                first = at + int(where[0]) if first < 0 else first
                differing += len(where)
            at += len(data) // width
    return f"bits: {differing} of {total} values differ, the first at {first}" if differing else ""
