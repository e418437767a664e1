"""Which device, how many threads, which dtype, and was it finite: in one place for every stage that needs torch.

No command runs this module.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import torch

from selectmoe.errors import UserError


def pick_device() -> torch.device:
    """The GPU of this process where there is one (LOCAL_RANK under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def set_threads(threads: int) -> int:
    """Use `threads` CPU threads; returns the number in use.

    Args:
        threads: how many; 0: all cores that this process may run on, shared with torchrun's others on this machine.
    """
    n = threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(n)
    return n


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def deterministic(seed: int) -> None:
    """Seed torch and refuse kernels whose result changes from run to run."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def seed_for(*place: int) -> None:
    """Seed torch by what is computed next, so that neither a restart nor another process's share changes its noise.

    Args:
        place: seed of the run, step, micro-batch.
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4], "big"))


def require_finite(parameters: Iterable[torch.Tensor], rate: str) -> None:
    """Refuse what a training made if its last step went astray; the loss tells of the steps before only.

    Args:
        parameters: all that were trained.
        rate: the key and value of the learning rate, for the message.

    Raises:
        UserError: one of them holds a NaN or an infinity.
    """
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise UserError(f"the training ended in weights that are not finite: lower {rate}")
