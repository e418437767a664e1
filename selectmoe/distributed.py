"""Several processes that train as one, started by torchrun: who they are, what they share, how a step is shared out.

    torchrun --nproc-per-node 2 -m selectmoe.cli warmup training.distributed=ddp ...

`warmup` and `finetune` train few parameters, so every process holds all of those. A step is planned as for one process;
process r computes every WORLD-th of its micro-batches from r on, the gradients are added up, and all take the same step.
With `ddp` every process holds the frozen model too; with `fsdp` it is sharded over them, layer by layer. Process 0 alone
writes (output folder, work, journal, screen); what it finds there it tells the others.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from selectmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

MODES = ("single", "ddp", "fsdp")
WAIT = datetime.timedelta(hours=1)
"""How long processes wait for each other: one may be fetching a large model for its node, or writing the output."""

_group: Any = None
"""torch.distributed, while processes train together."""

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_mode(mode: str) -> None:
    """Check the value of `training.distributed`.

    Raises:
        UserError: it is unknown.
    """
    if mode not in MODES:
        raise UserError(f"training.distributed={mode!r} is unknown; known: {', '.join(MODES)}")


def check_launch(stage: str, mode: str) -> None:
    """Check that this process was started as `training.distributed` says.

    Raises:
        UserError: several processes that know nothing of each other, or none to train with.
    """
    if mode == "single" and world() > 1:
        raise UserError(
            f"torchrun started {world()} processes: set training.distributed=ddp (or fsdp, which shards the frozen "
            f"model), or start selectmoe {stage} without torchrun"
        )
    if mode != "single" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"training.distributed={mode} needs torchrun: torchrun --nproc-per-node PROCESSES -m selectmoe.cli {stage} ..."
        )


def check_batch(rows: int, per_device: int) -> None:
    """Check that every process has something to compute in a step.

    Args:
        rows: of a step.
        per_device: of a micro-batch, at most.

    Raises:
        UserError: there are fewer micro-batches than processes.
    """
    if (parts := -(-rows // per_device)) < world():
        raise UserError(
            f"training.batch_size={rows} makes {parts} micro-batches of training.per_device_batch_size={per_device} for "
            f"{world()} processes: raise the one, or lower the other"
        )


@contextmanager
def together(mode: str) -> Iterator[None]:
    """Train together inside of this; nothing for `single`.

    The process group is made once and lasts as long as the process: a second one, met by way of what the first one left in
    torchrun's store, may wait for ever. After an error it is left as it is, since others may be waiting in it: torchrun
    ends them.
    """
    if mode == "single":
        yield
        return
    import torch
    from torch import distributed as dist

    global _group
    if not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo", timeout=WAIT)
        atexit.register(dist.destroy_process_group)
    _group = dist
    try:
        yield
    except BaseException:
        atexit.unregister(dist.destroy_process_group)
        raise
    finally:
        _group = None


def alone() -> bool:
    """Whether this process works by itself."""
    return _group is None


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, in every process; its mistake of the user's too.

    Args:
        make: called in process 0 only.

    Raises:
        UserError: raised by `make`.
    """
    if _group is None:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    _group.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    made: T = box[0]
    return made


def wait() -> None:
    """Return when every process is here."""
    if _group is not None:
        _group.barrier()


def share(batches: Sequence[T], lockstep: bool) -> list[tuple[int, T, float]]:
    """This process's micro-batches of a step.

    Args:
        batches: all of the step's, in order.
        lockstep: give every process as many: a sharded layer is computed by all of them or by none. Where there are none
            left, the first one comes once more, with weight 0.

    Returns:
        Number, micro-batch and weight (1 where it counts) of each.
    """
    mine = [(i, batches[i], 1.0) for i in range(rank(), len(batches), world())]
    if lockstep and len(mine) < -(-len(batches) // world()):
        mine.append((0, batches[0], 0.0))
    return mine


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every gradient the sum over the processes, in one float32 message; a process without one adds nothing."""
    if _group is None:
        return
    import torch

    owners = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
    flat = torch.cat([g.float().flatten() for g in grads])
    _group.all_reduce(flat)
    for p, total in zip(owners, torch.split(flat, [p.numel() for p in owners]), strict=True):
        p.grad = total.view_as(p).to(p.dtype)


def add_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """The sums of these numbers over the processes."""
    if _group is None:
        return numbers
    import torch

    from selectmoe.device import pick_device

    sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=pick_device())
    _group.all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))


def collect(items: list[T]) -> list[T]:
    """These items of every process, in the processes' order."""
    if _group is None:
        return items
    boxes: list[Any] = [None] * world()
    _group.all_gather_object(boxes, items)
    return [item for box in boxes for item in box]


def copy_first(tensors: Iterable[Tensor]) -> None:
    """Give these tensors the content that they have in process 0, in place."""
    if _group is not None:
        for tensor in tensors:
            _group.broadcast(tensor, src=0)


def shard(called: nn.Module, layers: Iterable[str] | None, whole: Iterable[nn.Parameter]) -> None:
    """Spread a frozen model over the processes, layer by layer (FSDP2); each layer is put together while it computes.

    Args:
        called: the module that is called, on the CPU, from where this process's part alone goes to its device. FSDP
            changes its class.
        layers: names of the layers' classes (a transformers model's `_no_split_modules`).
        whole: parameters that every process keeps: the trained ones, and what is to be saved.

    Raises:
        UserError: the model does not say what its layers are.
    """
    from torch.distributed.fsdp import fully_shard

    names = set(layers or ())
    found = [module for module in called.modules() if type(module).__name__ in names]
    if not found:
        raise UserError("training.distributed=fsdp: the model does not name its layers; use training.distributed=ddp")
    ignored = set(whole)
    for module in [*found, called]:
        fully_shard(module, ignored_params=ignored)


def put_back(called: nn.Module) -> None:
    """Give back what the last forward pass of a sharded model put together; nothing where it is not sharded."""
    for module in called.modules():
        reshard: Any = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
