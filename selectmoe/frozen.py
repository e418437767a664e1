"""The proof that a training changed nothing that it should not: one digest of all frozen tensors, before and after.

No command runs this module; `warmup` takes both digests, compares them and writes them down.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from selectmoe import distributed


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters without a gradient, and buffers, by name; of a sharded model (put back into shards) this process's part."""
    found: dict[str, Any] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    found |= dict(model.named_buffers())
    return {name: t.to_local() if hasattr(t, "to_local") else t for name, t in sorted(found.items())}


def _digest(entry: tuple[str, Tensor]) -> str:
    name, tensor = entry
    sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all frozen tensors, of every process."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(_digest, frozen_tensors(model).items()))
    mine = hashlib.sha256("".join(digests).encode()).hexdigest()
    return hashlib.sha256("".join(distributed.collect([mine])).encode()).hexdigest()
